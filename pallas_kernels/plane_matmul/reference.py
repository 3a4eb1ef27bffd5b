"""y = x W for W = sum over planes of a scale per block times signs or trits."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.quantized_matmul.reference import spread

Planes = tuple[UInt8[Array, "out _"], ...]
Scales = tuple[Float[Array, "out blocks"], ...]

# Bits of a code in its byte, the first input in the lowest bits.
WIDTHS = {"binary": 1, "ternary": 2}


def width(kind: str) -> int:
    """Bits of one code of a ``kind`` of plane."""
    if kind not in WIDTHS:
        raise ValueError(f"planes of kind {kind!r}; accepted: {', '.join(WIDTHS)}")
    return WIDTHS[kind]


def pack(values: Int8[Array, "out in"], kind: str) -> UInt8[Array, "out _"]:
    """Bytes of signs (-1 -> 0, +1 -> 1) or trits (two's complement in two bits)."""
    bits = width(kind)
    if values.shape[-1] % (8 // bits):
        raise ValueError(
            f"{values.shape[-1]} inputs; accepted: multiples of {8 // bits} ({kind})"
        )
    codes = values > 0 if kind == "binary" else values & 3
    codes = codes.astype(jnp.uint8).reshape(len(values), -1, 8 // bits)
    shifts = jnp.arange(8 // bits, dtype=jnp.uint8) * jnp.uint8(bits)
    return (codes << shifts[None, None]).sum(-1, dtype=jnp.uint8)


def unpack(
    plane: UInt8[Array, "out _"], kind: str, count: int
) -> Int8[Array, "out in"]:
    """Signs or trits of the first ``count`` inputs."""
    bits = width(kind)
    shifts = jnp.arange(8 // bits, dtype=jnp.uint8) * jnp.uint8(bits)
    codes = (plane[..., None] >> shifts[None, None]) & jnp.uint8(2**bits - 1)
    codes = codes.reshape(len(plane), -1)[:, :count].astype(jnp.int8)
    if kind == "binary":
        return 2 * codes - 1
    return codes - 4 * (codes >> 1)  # 3 is -1


def plane_matmul(
    x: Float[Array, "*batch in"],
    planes: Planes,
    scales: Scales,
    bias: Float[Array, "out blocks"] | None = None,
    *,
    kind: str,
    block: int | None,
) -> Float[Array, "*batch out"]:
    """y[m, n] = sum_k x[m, k] (bias[n, b] + sum_p scales[p][n, b] B_p[k, n]).

    ``kind`` is "binary" (B in {-1, +1}, one bit) or "ternary" ({-1, 0, 1}, two bits).
    With a bias this is extended binary coding, which holds uniform grids too (LUT-GEMM,
    arXiv:2206.09557, section 3); BitStack (arXiv:2410.23918) and trit-planes (PTQTP)
    have none. Input k is in block b = k / ``block`` (None: one block). Returns the
    dtype of ``x``; sums are float32.
    """
    if len(planes) != len(scales):
        raise ValueError(f"{len(planes)} planes and {len(scales)} scales")
    count = x.shape[-1]
    w = jnp.zeros((), jnp.float32)
    for plane, scale in zip(planes, scales, strict=True):
        values = unpack(plane, kind, count).astype(jnp.float32)
        w += values * spread(scale.astype(jnp.float32), block, count)
    if bias is not None:
        w += spread(bias.astype(jnp.float32), block, count)
    return jnp.einsum("...k,nk->...n", x.astype(jnp.float32), w).astype(x.dtype)
