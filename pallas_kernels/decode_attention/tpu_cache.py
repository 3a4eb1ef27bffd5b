"""TPU: how a tile of a dense, paged or quantized cache meets queries and shares.

A tile is [tokens * groups, bytes]: all key heads of a token side by side, as the cache
stores them. Queries are rows r * groups + g; a score whose row and column differ in g
is masked, which costs no more than a matrix unit with few rows anyway, and neither the
cache nor a tile is ever transposed. Codes are multiplied as they are: scales per token
go to the scores' columns, scales per channel to the queries.

XLA keeps arrays whose last axis is short with the slots minor. Scales per token come
that way, and a product with zeros and ones spreads them over the groups. So do codes
narrower than the 128 lanes: their tile is [groups, bytes, tokens] (``Side.minor``);
every row meets every group's tile and keeps the product of its own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention.stream import dot
from pallas_kernels.decode_attention.reference import QuantizedCache


@dataclasses.dataclass(frozen=True)
class Side:
    """What the kernel knows of keys, or of values, while tracing."""

    groups: int
    dim: int
    bits: int | None = None  # None: plain floats
    blocks: int = 1  # scales along a head
    tokens: int = 1  # that share a scale; more than one: per channel
    zeros: bool = False
    minor: bool = False

    @property
    def pieces(self) -> int:
        """Codes in a byte: piece j holds the channels congruent to j."""
        return 1 if self.bits is None else 8 // self.bits

    @property
    def per_channel(self) -> bool:
        return self.bits is not None and self.tokens > 1

    @property
    def arrays(self) -> int:
        """Operands of one tile: codes, scale, zero."""
        return 1 if self.bits is None else 2 + self.zeros


def side_of(cache, values: bool) -> Side:
    """The static part of a cache; refuses what the kernel does not read."""
    slots, groups, dim = cache.shape[1:]
    if not isinstance(cache, QuantizedCache):
        return Side(groups, dim)
    if cache.bits not in (2, 4, 8):
        raise NotImplementedError(f"a cache of {cache.bits} bits: several planes")
    tokens = slots // cache.scale.shape[1]
    blocks = cache.scale.shape[3]
    if cache.zero is not None and cache.zero.shape != cache.scale.shape:
        raise NotImplementedError("zeros and scales shared by different blocks")
    if tokens > 1 and (values or blocks != dim):
        raise NotImplementedError(
            f"scales of {tokens} tokens and {dim // blocks} channels; served: one "
            "token, or for keys one channel"
        )
    if tokens == 1 and blocks > 8:
        raise NotImplementedError(f"{blocks} scales a token; served: at most 8")
    zeros = cache.zero is not None
    return Side(groups, dim, cache.bits, 1 if tokens > 1 else blocks, tokens, zeros)


def slots_minor(keys, values) -> bool:
    """Whether both caches are narrow codes with scales per token."""
    return all(
        isinstance(cache, QuantizedCache)
        and cache.codes[0].shape[3] < 128
        and cache.scale.shape[1] == cache.shape[1]
        for cache in (keys, values)
    )


def operands(cache, side: Side) -> list:
    """The cache's arrays as the kernel sees them: codes, then scale and zero."""
    if side.bits is None:
        return [rows_of(cache)]
    params = [cache.scale] + ([cache.zero] if side.zeros else [])
    codes = cache.codes[0]
    codes = codes.transpose(0, 2, 3, 1) if side.minor else rows_of(codes)
    if side.per_channel:
        return [codes, *map(rows_of, params)]
    return [codes, *(p.transpose(0, 3, 2, 1) for p in params)]


def rows_of(x):
    """[rows, tokens, groups, n] as [rows, tokens * groups, n]."""
    return x.reshape(x.shape[0], -1, x.shape[3])


def specs(arrays, side: Side, tokens: int, place) -> list:
    """Blocks of ``tokens`` tokens; ``place`` gives (row, block of tokens)."""

    def spec(n, array):
        if array.ndim == 4:
            shape, index = (1, *array.shape[1:3], tokens), lambda r, t: (r, 0, 0, t)
        else:
            height = tokens * side.groups // (side.tokens if n else 1)
            shape, index = (1, height, array.shape[2]), lambda r, t: (r, t, 0)
        return pl.BlockSpec(shape, lambda *ids: index(*place(*ids)))

    return [spec(n, array) for n, array in enumerate(arrays)]


def apart(x, side: Side):
    """[.., dim] as [.., pieces, dim / pieces]: the channels of each piece together."""
    pieces = x.reshape(*x.shape[:-1], -1, side.pieces)
    return jnp.swapaxes(pieces, -1, -2)


def together(x):
    """The inverse of ``apart``."""
    joined = jnp.swapaxes(x, -1, -2)
    return joined.reshape(*joined.shape[:-2], -1)


def piece(codes, side: Side, n: int, dtype):
    """One code of each byte of a tile, exact in ``dtype``; floats as they are."""
    if side.bits is None:
        return codes
    wide = codes.astype(jnp.int32)
    if side.bits < 8:
        wide = (wide >> (n * side.bits)) & (2**side.bits - 1)
    return wide.astype(jnp.float32).astype(dtype)


def own_lanes(x, side: Side, block: int):
    """``x`` with the lanes that another block's scale covers set to zero."""
    if side.blocks == 1:
        return x
    width = x.shape[-1] // side.blocks
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    inside = (lane >= block * width) & (lane < (block + 1) * width)
    return jnp.where(inside, x, jnp.zeros_like(x))


def own_group(product, rows: int, groups: int):
    """Rows r * groups + g of ``product(g)``, for every g."""
    own = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % groups
    out = product(0)
    for g in range(1, groups):
        out = jnp.where(own == g, product(g), out)
    return out


def meet(rows, codes, side: Side, transpose: bool):
    """rows codes^T (or rows codes), against the codes of every row's own group."""
    if not side.minor:
        return dot(rows, codes, transpose)
    product = lambda g: dot(rows, codes[g], not transpose)  # noqa: E731
    return own_group(product, rows.shape[0], side.groups)


def selection(tokens: int, groups: int, dtype):
    """0/1 [tokens, tokens * groups]: the columns t * groups + g of token t."""
    token = jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens * groups), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens * groups), 1)
    first = token * groups
    return ((column >= first) & (column < first + groups)).astype(dtype)


def each_row(x, rows: int, side: Side):
    """[groups, tokens] of scales or zeros for rows r * groups + g and all columns.

    Exact: one term a sum, and bytes and bfloat16 scales are bfloat16 numbers.
    """
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.int32).astype(jnp.float32).astype(jnp.bfloat16)
    if not side.minor:
        x = dot(x, selection(x.shape[1], side.groups, x.dtype))
    return jnp.concatenate([x.astype(jnp.float32)] * (rows // side.groups), axis=0)


def shift(tile, side: Side, block: int, rows: int):
    """Zero points of a block of channels, or the middle code."""
    if not side.zeros:
        return float(2 ** (side.bits - 1))
    return each_row(tile[2][block], rows, side)


def scores(q, tile, side: Side):
    """q k^T, float32 [rows, columns]; ``q`` are the pieces [pieces, rows, lanes]."""
    pieces, rows = range(side.pieces), q.shape[1]
    if side.bits is None:
        return dot(q[0], tile[0], transpose=True)
    codes = [piece(tile[0], side, n, q.dtype) for n in pieces]
    if side.per_channel:
        return _channel_scores(q, codes, tile, side)
    total = 0.0
    for block in range(side.blocks):
        mine = [own_lanes(q[n], side, block) for n in pieces]
        product = sum(meet(mine[n], codes[n], side, transpose=True) for n in pieces)
        whole = sum(m.astype(jnp.float32).sum(-1, keepdims=True) for m in mine)
        shifted = product - whole * shift(tile, side, block, rows)
        total = total + each_row(tile[1][block], rows, side) * shifted
    return total


def _channel_scores(q, codes, tile, side: Side):
    """Scales and zeros of channels, for every run of ``side.tokens`` tokens."""
    lanes, copies = side.dim // side.pieces, q.shape[1] // side.groups
    columns, parts = side.tokens * side.groups, []
    params = [_apart_exact(p, side) for p in tile[1:]]
    for run in range(codes[0].shape[0] // columns):
        rows = slice(run * side.groups, (run + 1) * side.groups)
        part = 0.0
        for n in range(side.pieces):
            at = slice(n * lanes, (n + 1) * lanes)
            scale, *zero = (
                jnp.concatenate([p[rows, at]] * copies, axis=0) for p in params
            )
            scaled = q[n].astype(jnp.float32) * scale
            zero = zero[0] if zero else float(2 ** (side.bits - 1))
            own = codes[n][run * columns : (run + 1) * columns]
            part = part + dot(scaled.astype(own.dtype), own, transpose=True)
            part = part - (scaled * zero).sum(-1, keepdims=True)
        parts.append(part)
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _apart_exact(x, side: Side):
    """Lanes reordered piece by piece, by a product with a permutation matrix."""
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.int32).astype(jnp.float32)
    x = x.astype(jnp.float32)
    if side.pieces == 1:
        return x
    old = jax.lax.broadcasted_iota(jnp.int32, (side.dim, side.dim), 0)
    new = jax.lax.broadcasted_iota(jnp.int32, (side.dim, side.dim), 1)
    lanes = side.dim // side.pieces
    source = (new % lanes) * side.pieces + new // lanes
    return dot(x, (old == source).astype(jnp.float32))


def mix(shares, tile, side: Side, dtype):
    """shares v as pieces, a list of float32 [rows, lanes]."""
    if side.bits is None:
        return [dot(shares.astype(tile[0].dtype), tile[0])]
    rows = shares.shape[0]
    codes = [piece(tile[0], side, n, dtype) for n in range(side.pieces)]
    out = [0.0] * side.pieces
    for block in range(side.blocks):
        scaled = (shares * each_row(tile[1][block], rows, side)).astype(dtype)
        middle = scaled.astype(jnp.float32) * shift(tile, side, block, rows)
        middle = middle.sum(-1, keepdims=True)
        for n in range(side.pieces):
            part = meet(scaled, codes[n], side, transpose=False) - middle
            out[n] = out[n] + own_lanes(part, side, block)
    return out
