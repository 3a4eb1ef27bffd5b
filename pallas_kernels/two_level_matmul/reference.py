"""y = x W for int8 x and packed weights with an integer and a float level of scales."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Int, Int8, UInt8
from pallas_kernels.planes import Planes, check_blocks, check_planes, unpack


def check(x_codes, planes, group_scale, group_zero, x_scale, w_scale, bits, block):
    """ValueError names the argument that does not fit the others."""
    inputs = x_codes.shape[-1]
    outputs = check_planes(planes, inputs, bits)
    if x_codes.dtype != jnp.int8:
        raise ValueError(f"x_codes of {x_codes.dtype}; accepted: int8")
    grid = {"group_scale": group_scale, "group_zero": group_zero}
    check_blocks(outputs, inputs, block, **grid)
    if x_scale.shape != (*x_codes.shape[:-1], 1):
        raise ValueError(f"x_scale {x_scale.shape} for codes {x_codes.shape}")
    if w_scale.shape != (outputs, 1):
        raise ValueError(f"w_scale {w_scale.shape}; accepted: ({outputs}, 1)")
    if bits > 7 or block is None:
        raise ValueError(
            f"codes of {bits} bits in groups of {block}; accepted: 1 to 7 bits and "
            "groups of at least 1"
        )


def two_level_matmul(
    x_codes: Int8[Array, "*batch in"],
    planes: Planes,
    group_scale: Int[Array, "out groups"] | UInt8[Array, "out groups"],
    group_zero: UInt8[Array, "out groups"] | None,
    x_scale: Float[Array, "*batch 1"],
    w_scale: Float[Array, "out 1"],
    *,
    bits: int = 4,
    block: int = 128,
    out_dtype=jnp.bfloat16,
) -> Float[Array, "*batch out"]:
    """y = x_scale w_scale sum_k x[m, k] (code[n, k] - zero[n, g]) group_scale[n, g].

    The inner weight (code - zero) group_scale is an integer that fits into int8 by
    construction of the two levels (QServe's protective range, arXiv:2405.04532; DGQ,
    arXiv:2310.04836), so the sum over inputs is exact in int32. ``planes`` are stored
    as ``quantized_matmul``'s; without ``group_zero`` codes are centred on
    2^(bits - 1). ``block`` inputs share a group scale; the last group may be short.
    """
    check(x_codes, planes, group_scale, group_zero, x_scale, w_scale, bits, block)
    inputs = x_codes.shape[-1]
    codes = unpack(planes, bits, inputs).astype(jnp.int32)
    if group_zero is None:
        codes = codes - 2 ** (bits - 1)
    else:
        codes = codes - jnp.repeat(group_zero.astype(jnp.int32), block, 1)[:, :inputs]
    w = codes * jnp.repeat(group_scale.astype(jnp.int32), block, 1)[:, :inputs]
    x = x_codes.astype(jnp.int32)
    total = jnp.einsum("...k,nk->...n", x, w).astype(jnp.float32)
    per_output = jnp.expand_dims(w_scale[:, 0], range(total.ndim - 1))
    return (total * x_scale * per_output).astype(out_dtype)
