"""Integer products of codes of any widths: x of up to 8 bits, W of 1 to 8 in planes."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Int8
from pallas_kernels.planes import Planes, check_planes, unpack


def check(x_codes, planes, x_scale, w_scale, bits: int) -> None:
    """ValueError names the argument that does not fit the others."""
    outputs = check_planes(planes, x_codes.shape[-1], bits)
    if x_codes.dtype != jnp.int8:
        raise ValueError(f"x_codes of {x_codes.dtype}; accepted: int8")
    if x_scale.shape != (*x_codes.shape[:-1], 1):
        raise ValueError(f"x_scale {x_scale.shape} for codes {x_codes.shape}")
    if w_scale.shape != (outputs, 1):
        raise ValueError(f"w_scale {w_scale.shape}; accepted: ({outputs}, 1)")


def plane_product(
    x_codes: Int8[Array, "*batch in"],
    planes: Planes,
    x_scale: Float[Array, "*batch 1"],
    w_scale: Float[Array, "out 1"],
    *,
    bits: int,
    offset: int | None = None,
    out_dtype=jnp.bfloat16,
) -> Float[Array, "*batch out"]:
    """y[m, n] = x_scale[m] w_scale[n] sum_k x[m, k] (code[n, k] - offset).

    With planes W_i of part_i bits from bit low_i on, the sum is sum_i 2^low_i x W_i -
    offset sum_k x, exact in int32: the weight's half of ABQ-LLM's bit planes
    (arXiv:2408.08554). The paper also splits x, because binary tensor cores multiply
    single bits; int8 units take p <= 8 bits of x at once, so here x stays whole.
    ``planes`` are stored as ``quantized_matmul``'s; ``offset`` defaults to
    2^(bits - 1).
    """
    check(x_codes, planes, x_scale, w_scale, bits)
    middle = 2 ** (bits - 1) if offset is None else offset
    w = unpack(planes, bits, x_codes.shape[-1]).astype(jnp.int32) - middle
    total = jnp.einsum("...k,nk->...n", x_codes.astype(jnp.int32), w)
    per_output = w_scale.reshape((1,) * (total.ndim - 1) + (-1,))
    return (total.astype(jnp.float32) * x_scale * per_output).astype(out_dtype)
