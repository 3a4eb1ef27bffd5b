"""Codes and scale per token of x (A (x) B): QuaRot's and FlatQuant's online step."""

from __future__ import annotations

import math

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Int8, UInt8


def check(x, a, b, bits: int, clip: float) -> None:
    """ValueError names the argument that does not fit the others."""
    if any(f.shape != (len(f), len(f)) or not len(f) for f in (a, b)):
        raise ValueError(f"factors {a.shape} and {b.shape}; accepted: square ones")
    if x.shape[-1] % (len(a) * len(b)):
        raise ValueError(f"{len(a)} x {len(b)} does not divide the width {x.shape[-1]}")
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits; accepted: 4 (packed) and 8")
    if bits == 4 and x.shape[-1] % 2:
        raise ValueError(f"4-bit codes of an odd width {x.shape[-1]}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip {clip}; accepted: above 0, at most 1")


def hadamard_quantize(
    x: Float[Array, "*batch n"],
    a: Float[Array, "a a"],
    b: Float[Array, "b b"],
    *,
    bits: int = 8,
    clip: float = 1.0,
) -> tuple[
    Int8[Array, "*batch n"] | UInt8[Array, "*batch n/2"], Float[Array, "*batch 1"]
]:
    """codes = round(y / scale), scale = clip max|y| / (2^(bits-1) - 1), y = x (A(x)B).

    In rows of a b inputs X [a, b] the transform is A^T X B (FlatQuant,
    arXiv:2410.09426, eq. 4); Hadamard factors that carry their 1 / sqrt(order) give
    QuaRot's rotation (arXiv:2404.00456). Where a b divides n several times it is
    block-diagonal, as ``hadamard_transform`` is. ``bits`` 8 gives int8; 4 packs two
    codes in a byte, the first in the low bits, offset by 8 (``quantized_matmul``'s
    planes). Ties round to even; values beyond the scale are clipped to +-(2^(bits-1)
    - 1). A row of zeros has scale 1, and one with NaN no finite scale. The transform
    is computed in float32.
    """
    check(x, a, b, bits, clip)
    factors = len(a), len(b)
    shape = *x.shape[:-1], x.shape[-1] // math.prod(factors), *factors
    blocks = x.astype(jnp.float32).reshape(shape)
    left, right = a.astype(jnp.float32), b.astype(jnp.float32)
    y = jnp.einsum("...ij,ik,jl->...kl", blocks, left, right).reshape(x.shape)
    codes, scale = quantize(y, bits, clip)
    return (pack(codes) if bits == 4 else codes.astype(jnp.int8)), scale


def quantize(y, bits: int, clip: float):
    """Symmetric codes (int32) along the last axis, and their scale."""
    top = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(y), -1, keepdims=True, initial=0.0)
    # The largest of some numbers and NaN is not always NaN on a CPU.
    largest = jnp.where(jnp.isnan(y).any(-1, keepdims=True), jnp.nan, largest)
    scale = jnp.where(largest == 0, 1.0, largest * (clip / top))
    codes = jnp.clip(jnp.round(y / scale), -top, top)
    return codes.astype(jnp.int32), scale


def pack(codes):
    """Two 4-bit codes a byte, raised by 8 to be positive."""
    raised = (codes + 8).astype(jnp.uint8)
    pairs = raised.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << jnp.uint8(4))
