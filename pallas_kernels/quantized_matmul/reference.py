"""y = x W for weights of packed codes with a scale (and zero) per block of inputs."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float
from pallas_kernels.planes import Planes, check_blocks, check_planes, unpack

LowRank = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]


def check(x, planes, scale, zero, low_rank, bits: int, block, levels) -> None:
    """ValueError names the argument that does not fit the others."""
    inputs = x.shape[-1]
    outputs = check_planes(planes, inputs, bits)
    check_blocks(outputs, inputs, block, scale=scale, zero=zero)
    check_low_rank(low_rank, inputs, outputs)
    if levels is not None and (len(levels) - 1).bit_length() != bits:
        raise ValueError(
            f"{len(levels)} levels for codes of {bits} bits; accepted: "
            f"{2 ** (bits - 1) + 1} to {2**bits}"
        )
    if levels is not None and zero is not None:
        raise ValueError("levels and zero; accepted: one of them, or neither")


def check_low_rank(low_rank, inputs: int, outputs: int) -> None:
    """ValueError where L [in, rank] and R [rank, out] do not fit a weight."""
    if low_rank is None:
        return
    left, right = (a.shape for a in low_rank)
    if (left[:1], right[1:]) != ((inputs,), (outputs,)) or left[1:] != right[:1]:
        raise ValueError(
            f"low_rank {left} and {right}; accepted: {(inputs, 'rank')} and "
            f"{('rank', outputs)}"
        )


def spread(per_block, block: int | None, count: int) -> Float[Array, "out in"]:
    """One value per input from one per block; the last block may be short."""
    if block is None or per_block.shape[-1] == 1:
        return per_block
    return jnp.repeat(per_block, block, axis=-1)[..., :count]


def dequantize(planes, scale, zero, *, bits, block, count, levels=None, offset=None):
    """The weight as it is stored, [out, in] in float32."""
    codes = unpack(planes, bits, count)
    if levels is not None:
        values = jnp.asarray(levels, jnp.float32)[codes]
    else:
        middle = 2 ** (bits - 1) if offset is None else offset
        shift = middle if zero is None else spread(_wide(zero), block, count)
        values = _wide(codes) - shift
    return values * spread(_wide(scale), block, count)


def quantized_matmul(
    x: Float[Array, "*batch in"],
    planes: Planes,
    scale: Float[Array, "out blocks"],
    zero=None,
    low_rank: LowRank | None = None,
    *,
    bits: int,
    block: int | None,
    levels: tuple[float, ...] | None = None,
    offset: float | None = None,
) -> Float[Array, "*batch out"]:
    """y[m, n] = sum_k x[m, k] scale[n, k / block] (code[n, k] - zero[n, k / block]).

    ``planes`` are the codes of W^T, ``in`` packed in the minor axis (1 to 8 bits).
    Without ``zero`` codes are centred on ``offset`` (default 2^(bits-1)); with
    ``levels`` they index that ascending table instead. ``block`` inputs share a scale
    (None: all), the last block may be short. ``low_rank`` (L, R) adds x L R: an adapter
    (LoRA, arXiv:2106.09685) or a correction of the error (LQER, arXiv:2402.02446).
    Returns the dtype of ``x``; sums are float32.
    """
    check(x, planes, scale, zero, low_rank, bits, block, levels)
    count = x.shape[-1]
    w = dequantize(
        planes,
        scale,
        zero,
        bits=bits,
        block=block,
        count=count,
        levels=levels,
        offset=offset,
    )
    y = jnp.einsum("...k,nk->...n", _wide(x), w)
    return (y + corrected(x, low_rank)).astype(x.dtype)


def corrected(x, low_rank: LowRank | None):
    """x L R in float32, or 0 where there is no correction."""
    if low_rank is None:
        return 0.0
    left, right = map(_wide, low_rank)
    return (_wide(x) @ left) @ right


def _wide(a):
    return a.astype(jnp.float32)
