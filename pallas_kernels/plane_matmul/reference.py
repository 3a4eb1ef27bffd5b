"""y = x W for W = sum over planes of a scale per block times signs or trits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.annotations import Array, Float, Int8, UInt8
from pallas_kernels.planes import Planes, check_blocks, check_bytes
from pallas_kernels.quantized_matmul.reference import spread

Scales = tuple[Float[Array, "out blocks"], ...]

# Values of one code and how many a byte holds, the first input in the lowest place.
PLACES = {"binary": (2, 8), "ternary": (4, 4), "trits": (3, 5)}


def places(kind: str) -> tuple[int, int]:
    """(base, codes in a byte) of a ``kind`` of plane."""
    if kind not in PLACES:
        raise ValueError(f"planes of kind {kind!r}; accepted: {', '.join(PLACES)}")
    return PLACES[kind]


def check(x, planes, scales, bias, kind: str, block: int | None) -> None:
    """ValueError names the argument that does not fit the others."""
    (_, held), inputs, outputs = places(kind), x.shape[-1], len(planes[0])
    if len(planes) != len(scales):
        raise ValueError(f"{len(planes)} planes and {len(scales)} scales")
    check_bytes(planes, [(outputs, -(-inputs // held))] * len(planes))
    each = {f"scales[{i}]": scale for i, scale in enumerate(scales)}
    check_blocks(outputs, inputs, block, **each, bias=bias)


def pack(values: Int8[Array, "out in"], kind: str) -> UInt8[Array, "out _"]:
    """Bytes of signs (-1 -> 0, +1 -> 1), of trits in two bits (two's complement), or
    of five trits (-1 -> 0, 0 -> 1, 1 -> 2, base three)."""
    base, count = places(kind)
    short = -values.shape[-1] % count
    codes = {"binary": values > 0, "ternary": values & 3, "trits": values + 1}[kind]
    codes = jnp.pad(codes.astype(jnp.uint8), ((0, 0), (0, short)))
    codes = codes.reshape(len(values), codes.shape[-1] // count, count)
    return (codes * _powers(base, count)).sum(-1, dtype=jnp.uint8)


def unpack(
    plane: UInt8[Array, "out _"], kind: str, count: int
) -> Int8[Array, "out in"]:
    """Signs or trits of the first ``count`` inputs."""
    base, held = places(kind)
    codes = plane[..., None] // _powers(base, held) % jnp.uint8(base)
    codes = codes.reshape(len(plane), plane.shape[-1] * held)
    codes = codes[:, :count].astype(jnp.int8)
    if kind == "binary":
        return 2 * codes - 1
    if kind == "trits":
        return codes - 1
    return codes - 4 * (codes >> 1)  # 3 is -1


def block_sums(
    x: Float[Array, "*batch in"], size: int
) -> Float[Array, "*batch blocks"]:
    """float32 sums of x over blocks of inputs, the last of which may be short."""
    short = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    filled = jnp.pad(x.astype(jnp.float32), short)
    return filled.reshape(*x.shape[:-1], filled.shape[-1] // size, size).sum(-1)


def _powers(base: int, count: int) -> UInt8[Array, "1 1 places"]:
    """What one is worth at each place of a byte."""
    return jnp.asarray(base ** np.arange(count), jnp.uint8)[None, None]


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

    ``kind`` is "binary" (B in {-1, +1}, one bit), "ternary" ({-1, 0, 1}, two bits) or
    "trits" (the same, five to a byte: 1.6 bits).
    With a bias this is extended binary coding, which holds uniform grids too (LUT-GEMM,
    arXiv:2206.09557, section 3); BitStack (arXiv:2410.23918) and trit-planes (PTQTP)
    have none. Input k is in block b = k / ``block`` (None: one block). Returns the
    dtype of ``x``; sums are float32.
    """
    check(x, planes, scales, bias, kind, block)
    count = x.shape[-1]
    w = jnp.zeros((), jnp.float32)
    for plane, scale in zip(planes, scales, strict=True):
        values = unpack(plane, kind, count).astype(jnp.float32)
        w += values * spread(scale.astype(jnp.float32), block, count)
    if bias is not None:
        w += spread(bias.astype(jnp.float32), block, count)
    return jnp.einsum("...k,nk->...n", x.astype(jnp.float32), w).astype(x.dtype)
