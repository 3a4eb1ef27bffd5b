"""One query per sequence against its cache: dense, paged or quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Int, Integer
from pallas_kernels.flash_attention.reference import NEGATIVE, check_sinks
from pallas_kernels.planes import parts, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedCache:
    """Keys or values as packed codes: x = scale (code - zero).

    ``codes`` are planes [batch, slots, groups, bytes] packed along the head
    dimension (a plane for each power of two in ``bits``; the first code in the low
    bits of a byte). ``scale`` and ``zero`` are [batch, slots / n, groups, dim / m] for
    any n and m that divide: a scale per token (n = 1) and block of m channels, or per
    channel (m = 1) of n consecutive tokens (KIVI, arXiv:2402.02750: keys per channel,
    values per token). Without ``zero`` codes are centred on 2^(bits-1).
    """

    codes: tuple[Any, ...]
    scale: Any
    zero: Any = None
    bits: int = dataclasses.field(default=8, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that the codes stand for."""
        plane, part = self.codes[0], parts(self.bits)[0]
        return (*plane.shape[:-1], plane.shape[-1] * 8 // part)

    def dequantize(self) -> Float[Array, "batch slots groups dim"]:
        """The values in float32."""
        codes = unpack(self.codes, self.bits, self.shape[-1]).astype(jnp.float32)
        middle = float(2 ** (self.bits - 1))
        zero = middle if self.zero is None else _spread(self.zero, codes.shape)
        return (codes - zero) * _spread(self.scale, codes.shape)


Cache = Float[Array, "rows slots groups dim"] | QuantizedCache


def _spread(per_block, shape):
    """One value per element from one per block of slots and of channels."""
    tokens, channels = (shape[i] // max(1, per_block.shape[i]) for i in (1, 3))
    wide = jnp.repeat(per_block.astype(jnp.float32), tokens, axis=1)
    return jnp.repeat(wide, channels, axis=3)


def values_of(cache: Cache) -> Float[Array, "rows slots groups dim"]:
    """The cache in float32."""
    if isinstance(cache, QuantizedCache):
        return cache.dequantize()
    return cache.astype(jnp.float32)


def check(q, keys, values, lengths, pages, sinks, window) -> Int[Array, "batch"]:
    """The lengths as int32, at least 0; refuses what has no meaning."""
    if q.ndim != 3 or len(keys.shape) != 4 or keys.shape != values.shape:
        raise ValueError(
            f"q {q.shape}, keys {keys.shape}, values {values.shape}; accepted: q "
            "[batch, heads, dim] with both caches [batch, slots, groups, dim], or "
            "[pages, page, groups, dim] with a page table"
        )
    heads, groups = q.shape[1], keys.shape[2]
    if q.shape[2] != keys.shape[3] or not groups or heads % groups:
        raise ValueError(
            f"q {q.shape} and keys {keys.shape}: dim must agree and heads must be a "
            "multiple of groups"
        )
    _check_integers("lengths", lengths, 1)
    if pages is not None:
        _check_integers("pages", pages, 2)
    rows = keys.shape[0] if pages is None else pages.shape[0]
    if lengths.shape != (q.shape[0],) or rows != q.shape[0]:
        raise ValueError(
            f"lengths {lengths.shape} and {rows} cache rows for {q.shape[0]} queries"
        )
    for cache in (keys, values):
        _check_scales(cache)
    check_sinks(sinks, heads)
    if window is not None and window < 1:
        raise ValueError(f"window {window}; accepted: None or at least 1")
    return jnp.maximum(lengths.astype(jnp.int32), 0)


def _check_integers(name: str, a, ndim: int) -> None:
    if a.ndim != ndim or not jnp.issubdtype(a.dtype, jnp.integer):
        raise ValueError(
            f"{name} {a.dtype}{list(a.shape)}; accepted: integers of {ndim} dimensions"
        )


def _check_scales(cache: Cache) -> None:
    """Refuse scales and zeros that are not of equal blocks of slots and channels."""
    if not isinstance(cache, QuantizedCache):
        return
    for a in (cache.scale, cache.zero):
        if a is None:
            continue
        blocks = zip(cache.shape[1::2], a.shape[1::2], strict=True)
        if a.shape[::2] != cache.shape[::2] or any(n % max(m, 1) for n, m in blocks):
            raise ValueError(
                f"scale or zero {a.shape} of a cache {cache.shape}; accepted: parts of "
                "slots and dim that divide them"
            )


def slots_of(cache, pages) -> int:
    """The slots of a sequence."""
    return cache.shape[1] if pages is None else pages.shape[1] * cache.shape[1]


def gathered(cache, pages):
    """[batch, slots, ...] from a pool [pages, page, ...] and a table of page ids."""
    if pages is None:
        return cache
    rows, count = pages.shape
    return jax.tree.map(
        lambda a: a[pages].reshape(rows, count * a.shape[1], *a.shape[2:]), cache
    )


def decode_attention(
    q: Float[Array, "batch heads dim"],
    keys: Cache,
    values: Cache,
    lengths: Integer[Array, "batch"],
    pages: Integer[Array, "batch max_pages"] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    sums: bool = False,
):
    """o[b] = sum_t p_bt v[b, t], p_b = softmax over t < lengths[b] of scale q . k[t].

    Slots from ``lengths`` on are unwritten. ``window`` keeps those from lengths[b] -
    window on. With ``pages`` the caches are pools [pages, page, groups, dim] and
    sequence b is the pages of its row, in order; ids past its length may be anything
    in range. ``soft_cap`` and ``sinks`` are those of ``flash_attention``. Scores and
    sums are float32; the result has the dtype of ``q``; where no slot is seen it is
    zero.

    With ``sums`` also the float32 column sums [batch, groups, slots] of p over the
    query heads of each group, which cache policies accumulate (H2O, arXiv:2306.14048).
    """
    lengths = check(q, keys, values, lengths, pages, sinks, window)
    k, v = (values_of(gathered(cache, pages)) for cache in (keys, values))
    batch, slots, groups, dim = k.shape
    shape = batch, groups, q.shape[1] // groups, dim
    grouped = q.astype(jnp.float32).reshape(shape)
    scores = jnp.einsum("bgrd,btgd->bgrt", grouped, k)
    scores = scores * (dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    slot, length = jnp.arange(slots)[None], lengths[:, None]
    seen = slot < length
    if window is not None:
        seen = seen & (slot >= length - window)
    seen = seen[:, None, None]
    scores = jnp.where(seen, scores, NEGATIVE)
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(1, groups, -1, 1)
        column = jnp.broadcast_to(column, (*scores.shape[:3], 1))
        scores = jnp.concatenate((scores, column), -1)
    shares = jnp.where(seen, jax.nn.softmax(scores, -1)[..., :slots], 0.0)
    mixed = jnp.einsum("bgrt,btgd->bgrd", shares, v).reshape(q.shape).astype(q.dtype)
    return (mixed, shares.sum(2)) if sums else mixed
