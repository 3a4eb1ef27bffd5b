"""y = x W for 8-bit codes of both, with a scale per row of x and per block of W."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Shaped
from pallas_kernels.planes import check_blocks

LONGEST = 2**31 // 128**2  # inputs that int32 sums of int8 products can hold


def check(x_codes, w_codes, x_scale, w_scale, block: int | None) -> int:
    """The number of inputs in a block; ValueError names what does not fit."""
    inputs = x_codes.shape[-1]
    if x_codes.dtype != w_codes.dtype:
        raise ValueError(f"codes of {x_codes.dtype} times codes of {w_codes.dtype}")
    if w_codes.shape[-1] != inputs:
        raise ValueError(f"x has {inputs} inputs, the weight {w_codes.shape[-1]}")
    if x_codes.dtype == jnp.int8 and inputs >= LONGEST:
        raise ValueError(f"{inputs} inputs overflow int32; accepted: below {LONGEST}")
    if x_scale.shape != (*x_codes.shape[:-1], 1):
        raise ValueError(f"x_scale {x_scale.shape} for codes {x_codes.shape}")
    check_blocks(len(w_codes), inputs, block, w_scale=w_scale)
    return max(1, inputs if block is None else min(block, inputs))


def scaled_matmul(
    x_codes: Shaped[Array, "*batch in"],
    w_codes: Shaped[Array, "out in"],
    x_scale: Float[Array, "*batch 1"],
    w_scale: Float[Array, "out blocks"],
    *,
    block: int | None = None,
    out_dtype=jnp.bfloat16,
) -> Float[Array, "*batch out"]:
    """y[m, n] = x_scale[m] sum_b w_scale[n, b] sum_{k in b} x[m, k] w[n, k].

    Codes are int8 (the inner sum is exact, in int32) or float8_e4m3fn (summed in
    float32), of one dtype. ``block`` inputs share a scale of the weight (None: all);
    the last block may be short. The outer sum is float32, in the order of the blocks.
    W8A8 as in SmoothQuant (arXiv:2211.10438), FP8 as in arXiv:2209.05433.
    """
    width = check(x_codes, w_codes, x_scale, w_scale, block)
    inputs = x_codes.shape[-1]
    y = jnp.zeros((*x_codes.shape[:-1], len(w_codes)), jnp.float32)
    whole = inputs // width

    def add(b, y):
        here = lambda a: jax.lax.dynamic_slice_in_dim(a, b * width, width, -1)  # noqa: E731
        scale = jax.lax.dynamic_slice_in_dim(w_scale, b, 1, -1)
        return y + _product(here(x_codes), here(w_codes)) * scale[:, 0]

    if whole:
        y = jax.lax.fori_loop(0, whole, add, y)
    if inputs % width:
        rest = whole * width
        last = _product(x_codes[..., rest:], w_codes[:, rest:])
        y = y + last * w_scale[:, -1]
    return (y * x_scale).astype(out_dtype)


def _product(x, w):
    """x W^T, exact for integers, as float32."""
    if x.dtype == jnp.int8:
        kind = jnp.int32
    else:
        x, w, kind = x.astype(jnp.float32), w.astype(jnp.float32), jnp.float32
    y = jnp.einsum("...k,nk->...n", x, w, preferred_element_type=kind)
    return y.astype(jnp.float32)
