"""y = x W for weights of which every m inputs keep n, stored as values and a mask."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, UInt8
from pallas_kernels.planes import Planes, check_blocks, check_planes, unpack
from pallas_kernels.quantized_matmul.reference import (
    LowRank,
    check_low_rank,
    corrected,
    spread,
)


def check(x, mask, values, scale, zero, low_rank, n: int, m: int, bits, block):
    """ValueError names the argument that does not fit the others."""
    inputs, outputs = x.shape[-1], len(mask)
    if not 0 < n < m or inputs % m:
        raise ValueError(f"{n}:{m} along {inputs} inputs")
    if mask.shape[1] != -(-inputs // 8):
        raise ValueError(f"mask {mask.shape} for {inputs} inputs, 8 in a byte")
    kept = outputs, inputs // m * n
    if len({bits is None, scale is None, hasattr(values, "shape")}) > 1:
        raise ValueError("planes, bits and scale go together: packed codes have all")
    if zero is not None and scale is None:
        raise ValueError("zero without a scale; accepted: both, or neither")
    if bits is None and values.shape != kept:
        raise ValueError(f"values {values.shape}; accepted: {kept}")
    if bits is not None and check_planes(values, kept[1], bits) != outputs:
        raise ValueError(f"values of {len(values[0])} outputs, the mask of {outputs}")
    check_blocks(outputs, inputs, block, scale=scale, zero=zero)
    check_low_rank(low_rank, inputs, outputs)


def nm_matmul(
    x: Float[Array, "*batch in"],
    mask: UInt8[Array, "out _"],
    values: Float[Array, "out kept"] | Planes,
    scale: Float[Array, "out blocks"] | None = None,
    zero=None,
    low_rank: LowRank | None = None,
    *,
    n: int,
    m: int,
    bits: int | None = None,
    block: int | None = None,
) -> Float[Array, "*batch out"]:
    """y[r, o] = sum over kept k of x[r, k] w[o, k], n kept of every m inputs.

    ``mask`` has a bit per input, the first in the lowest bit, n set in each group of
    m; ``values`` [out, in n / m] are the kept weights of a row in order (2:4 as in
    NVIDIA's sparse tensor cores, arXiv:2104.08378), or with ``bits`` the planes of
    their codes, as ``quantized_matmul`` stores them. Then w = scale (code - zero),
    centred on 2^(bits - 1) without ``zero``, and scale and zero belong to ``block``
    dense inputs, kept or not. ``low_rank`` (L, R) adds x L R, as in
    ``quantized_matmul`` (sparse, low-bit and low-rank: SLiM, arXiv:2410.09615). Sums
    are float32; the result has the dtype of ``x``.
    """
    check(x, mask, values, scale, zero, low_rank, n, m, bits, block)
    inputs = x.shape[-1]
    kept = inputs // m * n
    flags = unpack((mask,), 1, inputs).astype(bool)
    stored = values if bits is None else unpack(values, bits, kept)
    place = jnp.clip(jnp.cumsum(flags, -1) - 1, 0, kept - 1)
    w = jnp.take_along_axis(stored, place, -1).astype(jnp.float32)
    if scale is not None:
        wide = lambda a: spread(a.astype(jnp.float32), block, inputs)  # noqa: E731
        middle = 2.0 ** (bits - 1) if zero is None else wide(zero)
        w = (w - middle) * wide(scale)
    w = jnp.where(flags, w, 0)
    y = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), w)
    return (y + corrected(x, low_rank)).astype(x.dtype)
