"""y = x W for weights of which every m inputs keep n, stored as values and a mask."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.planes import Planes, unpack
from pallas_kernels.quantized_matmul.reference import LowRank, corrected


def check(x, mask, values, scale, zero, n: int, m: int, bits, block) -> None:
    """ValueError names the argument that does not fit the others."""
    inputs, outputs = x.shape[-1], len(mask)
    if not 0 < n < m or inputs % m:
        raise ValueError(f"{n}:{m} along {inputs} inputs")
    if mask.shape[1] != -(-inputs // 8):
        raise ValueError(f"mask {mask.shape} for {inputs} inputs, 8 in a byte")
    if (bits is None) != (scale is None):
        raise ValueError("bits and scale go together: packed codes have both")
    if bits is None and values.shape != (outputs, inputs // m * n):
        raise ValueError(
            f"values {values.shape}; accepted: {(outputs, inputs // m * n)}"
        )
    if scale is not None:
        blocks = 1 if block is None else -(-inputs // block)
        if scale.shape != (outputs, blocks):
            raise ValueError(f"scale {scale.shape}; accepted: {(outputs, blocks)}")
    if zero is not None and (scale is None or zero.shape != scale.shape):
        raise ValueError("zero has the shape of scale, and needs one")


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
    check(x, mask, values, scale, zero, n, m, bits, block)
    inputs = x.shape[-1]
    kept = inputs // m * n
    flags = unpack((mask,), 1, inputs).astype(bool)
    stored = values if bits is None else unpack(values, bits, kept)
    place = jnp.clip(jnp.cumsum(flags, -1) - 1, 0, kept - 1)
    w = jnp.take_along_axis(stored, place, -1).astype(jnp.float32)
    if scale is not None:
        middle = 2.0 ** (bits - 1) if zero is None else _spread(zero, block, inputs)
        w = (w - middle) * _spread(scale, block, inputs)
    w = jnp.where(flags, w, 0)
    y = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), w)
    return (y + corrected(x, low_rank)).astype(x.dtype)


def _spread(per_block, block: int | None, inputs: int):
    """One float32 value per input from one per block."""
    wide = per_block.astype(jnp.float32)
    return wide if block is None else jnp.repeat(wide, block, 1)[:, :inputs]
