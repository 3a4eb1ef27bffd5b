"""TPU kernel: one pass over the cache in the layout that models keep it in.

jax's ``paged_attention`` wants pools with the key heads outermost, which would copy a
cache [slots, groups, dim] at every token, and reads neither packed codes nor windows,
so this kernel is our own. The slots are split over the grid's parallel axis and the
parts combined at the end (flash decoding); blocks past a sequence's length, or before
its window, are neither fetched nor computed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.stream import dot
from pallas_kernels.decode_attention import tpu_cache
from pallas_kernels.decode_attention.reference import check, slots_of
from pallas_kernels.decode_attention.tpu_cache import Side
from pallas_kernels.flash_attention.reference import NEGATIVE

LANES = 128
COLUMNS = 2048  # tokens times groups that a step multiplies; of codes, half as many


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tokens a step (None: by shape), and parts that the slots are split into."""

    tokens: int | None = None
    splits: int = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel knows while tracing."""

    keys: Side
    values: Side
    scale: float
    soft_cap: float | None
    window: int | None
    sums: bool
    tokens: int  # of a step
    tiles: int  # of a step: pages, or one
    steps: int  # of a split
    splits: int
    slots: int  # of a sequence's cache

    @property
    def interleaved(self) -> int:
        """Columns of scores for a token: one for each key head, or one for all."""
        return 1 if self.keys.minor else self.keys.groups

    @property
    def columns(self) -> int:
        return self.tokens * self.interleaved

    def first(self, length):
        """The first block that the window touches."""
        if self.window is None or self.sums:
            return 0
        return lax.div(jnp.maximum(length - self.window, 0), self.tokens)

    def block(self, length, split, step):
        """The block of a grid step, and whether the sequence reaches it."""
        written = jnp.minimum(length, self.slots)
        last = lax.div(written + self.tokens - 1, self.tokens) - 1
        wanted = self.first(length) + split * self.steps + step
        return jnp.clip(wanted, 0, jnp.maximum(last, 0)), wanted <= last

    def visible(self, shape, block, length):
        """bool[rows, columns]: own group, written, within the window."""
        groups = self.interleaved
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        own = _remainder(row, groups) == _remainder(column, groups)
        place = block * self.columns + column
        seen = own & (place < length * groups)
        if self.window is None:
            return own, seen
        return own, seen & (place >= (length - self.window) * groups)


def _remainder(x, n: int):
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, n)


def decode_kernel(plan: Plan, lengths, pages, q, *refs):
    """One step of one split: the online softmax over a block of tokens."""
    inputs, outputs, scratch = _parted(plan, refs)
    peak, total, acc = scratch
    batch, split, step = (pl.program_id(i) for i in range(3))
    length = lengths[batch]
    block, live = plan.block(length, split, step)

    @pl.when(step == 0)
    def _():
        peak[...] = jnp.full_like(peak, NEGATIVE)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(live)
    def _():
        pairs = [[[ref[0] for ref in side] for side in tile] for tile in inputs]
        parts = [tpu_cache.scores(q[0], keys, plan.keys) for keys, _ in pairs]
        s = plan.scale * (jnp.concatenate(parts, 1) if plan.tiles > 1 else parts[0])
        if plan.soft_cap is not None:
            s = plan.soft_cap * jnp.tanh(s / plan.soft_cap)
        own, seen = plan.visible(s.shape, block, length)
        if plan.sums:
            outputs[3][0] = _compact(jnp.where(own, s, 0.0), plan.keys.groups)
        s = jnp.where(seen, s, -jnp.inf)
        before = peak[:, :1]
        after = jnp.maximum(before, s.max(-1, keepdims=True))
        p, kept = jnp.exp(s - after), jnp.exp(before - after)
        total[...] = total[...] * kept + p.sum(-1, keepdims=True)
        peak[...] = jnp.broadcast_to(after, peak.shape)
        width = plan.columns // plan.tiles
        mixed = [
            tpu_cache.mix(
                p[:, n * width : (n + 1) * width], values, plan.values, q.dtype
            )
            for n, (_, values) in enumerate(pairs)
        ]
        for n in range(plan.values.pieces):
            acc[n] = acc[n] * kept + sum(m[n] for m in mixed)

    @pl.when(step == plan.steps - 1)
    def _():
        outputs[0][0, 0] = acc[...]
        outputs[1][0, 0] = peak[...]
        outputs[2][0, 0] = total[...]


def _parted(plan: Plan, refs):
    """References as tiles of (keys, values), outputs and scratch."""
    tiles, at = [], 0
    for _ in range(plan.tiles):
        tile = []
        for side in (plan.keys, plan.values):
            tile.append(refs[at : at + side.arrays])
            at += side.arrays
        tiles.append(tile)
    return tiles, refs[at:-3], refs[-3:]


def _compact(s, groups: int):
    """Scores [rows, tokens * groups], zero off a row's own group, as [rows, tokens]."""
    if groups % 8 == 0:  # whole sublanes: the reshape is free
        return s.T.reshape(-1, groups, s.shape[0]).sum(1).T
    picks = tpu_cache.selection(s.shape[1] // groups, groups, jnp.float32)
    return dot(s, picks, transpose=True)


def launch(plan: Plan, q, keys, values, lengths, pages, interpret: bool):
    """Partial outputs, maxima and sums of each split (and compact scores)."""
    batch, _, rows, _ = q.shape
    arrays, in_specs = [], []
    for n in range(plan.tiles):
        for cache, side in ((keys, plan.keys), (values, plan.values)):
            own = tpu_cache.operands(cache, side)
            place = _place(plan, n, pages is not None)
            arrays += own
            tokens = plan.tokens // plan.tiles
            in_specs += tpu_cache.specs(own, side, tokens, place)
    split = lambda b, s, i, *_: (b, s, 0, 0)  # noqa: E731
    narrow = (1, 1, rows, LANES)
    lanes = plan.values.dim // plan.values.pieces
    wide = (1, 1, plan.values.pieces, rows, lanes)
    out_specs = [
        pl.BlockSpec(wide, lambda b, s, i, *_: (b, s, 0, 0, 0)),
        pl.BlockSpec(narrow, split),
        pl.BlockSpec(narrow, split),
    ]
    shapes = [(batch, plan.splits, *spec.block_shape[2:]) for spec in out_specs]
    if plan.sums:
        out_specs.append(
            pl.BlockSpec(
                (1, rows, plan.tokens),
                lambda b, s, i, *_: (b, 0, s * plan.steps + i),
            )
        )
        shapes.append((batch, rows, plan.splits * plan.steps * plan.tokens))
    table = jnp.zeros((1, 1), jnp.int32) if pages is None else pages.astype(jnp.int32)
    return pl.pallas_call(
        lambda *refs: decode_kernel(plan, *refs),
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, plan.splits, plan.steps),
            in_specs=[
                pl.BlockSpec((1, *q.shape[1:]), lambda b, s, i, *_: (b, 0, 0, 0)),
                *in_specs,
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM(narrow[2:], jnp.float32),
                pltpu.VMEM(narrow[2:], jnp.float32),
                pltpu.VMEM(wide[2:], jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="decode_attention",
    )(lengths, table, q, *arrays)


def _place(plan: Plan, tile: int, paged: bool):
    """Where tile ``tile`` of a grid step lies: (row of the cache, block of tokens)."""

    def place(b, s, i, lengths, pages):
        block, _ = plan.block(lengths[b], s, i)
        if not paged:
            return b, block
        return pages[b, block * plan.tiles + tile], 0

    return place


def combine(plan: Plan, parts, peaks, totals, sinks):
    """One softmax from those of the splits: o [batch, rows, dim] and its log-sum."""
    peaks, totals = peaks[..., :1], totals[..., :1]
    peak = peaks.max(1)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks)
    weights = jnp.exp(peaks - peak[:, None])
    total = (weights * totals).sum(1)
    if sinks is not None:
        total = total + jnp.exp(sinks - peak)
    mixed = (weights[:, :, None] * parts).sum(1)
    mixed = tpu_cache.together(jnp.swapaxes(mixed, 1, 2))
    safe = jnp.where(total > 0, total, 1.0)
    return mixed / safe, peak + jnp.log(safe)


def step_tokens(wanted: int | None, slots: int, sides: tuple[Side, Side]) -> int:
    """The tokens of a step for a cache without pages: a divisor of its slots."""
    keys, packed = sides[0], any(side.bits is not None for side in sides)
    columns = COLUMNS // 2 if packed else COLUMNS
    least = LANES if packed else 64  # scales lie with the slots minor
    largest = wanted or max(columns // keys.groups, keys.tokens, least)
    largest = max(largest, 256) if keys.minor else largest
    if slots <= largest:
        return slots
    size = 1 << (largest.bit_length() - 1)
    while size >= least and slots % size:
        size //= 2
    if size < least or size % keys.tokens:
        raise NotImplementedError(f"{slots} slots: not a multiple of {least}")
    return size


def make_plan(keys, values, pages, tuning: Tuning, options) -> Plan:
    """Blocks and splits for these shapes."""
    sides = tpu_cache.side_of(keys, False), tpu_cache.side_of(values, True)
    if pages is None and not options["sums"] and tpu_cache.slots_minor(keys, values):
        sides = tuple(dataclasses.replace(side, minor=True) for side in sides)
    slots, window = keys.shape[1], options["window"]
    if pages is None:
        tokens, tiles = step_tokens(tuning.tokens, slots, sides), 1
        blocks = slots // tokens
    else:
        count, largest = pages.shape[1], COLUMNS // (slots * sides[0].groups)
        tiles = next(n for n in (8, 4, 2, 1) if n <= max(largest, 1) and not count % n)
        tokens, blocks = slots * tiles, count // tiles
    if window is not None and not options["sums"]:
        blocks = min(blocks, -(-window // tokens) + 1)
    splits = min(tuning.splits, blocks)
    return Plan(
        *sides, tokens=tokens, tiles=tiles, steps=-(-blocks // splits), splits=splits,
        slots=slots_of(keys, pages), **options,
    )  # fmt: skip


def decode_attention(
    q, keys, values, lengths, pages=None, sinks=None, *, scale=None, soft_cap=None,
    window=None, sums=False, interpret=False, tuning: Tuning | None = None,
):  # fmt: skip
    """The reference's arguments."""
    lengths = check(q, keys, values, lengths, pages, sinks, window)
    batch, _, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    options = dict(scale=scale, soft_cap=soft_cap, window=window, sums=sums)
    plan = make_plan(keys, values, pages, tuning or Tuning(), options)
    groups = plan.keys.groups
    # Row r * groups + g is query head g * (heads / groups) + r.
    rows = jnp.swapaxes(q.reshape(batch, groups, -1, dim), 1, 2)
    rows = jnp.moveaxis(tpu_cache.apart(rows.reshape(q.shape), plan.keys), 2, 1)
    out = launch(plan, rows, keys, values, lengths, pages, interpret)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(groups, -1).T.reshape(1, -1, 1)
    mixed, logsum = combine(plan, *out[:3], sinks)
    mixed = jnp.swapaxes(mixed.reshape(batch, -1, groups, dim), 1, 2)
    mixed = mixed.reshape(q.shape).astype(q.dtype)
    return (
        (mixed, _column_sums(plan, out[3], logsum, lengths, pages, keys))
        if sums
        else mixed
    )


def _column_sums(plan: Plan, scores, logsum, lengths, pages, keys):
    """[batch, groups, slots]: exp(score - logsum) over the heads of a group."""
    slots = slots_of(keys, pages)
    slot, length = jnp.arange(slots)[None], lengths[:, None]
    seen = slot < length
    if plan.window is not None:
        seen = seen & (slot >= length - plan.window)
    shares = jnp.exp(scores[:, :, :slots] - logsum)
    shares = jnp.where(seen[:, None], shares, 0.0)
    return shares.reshape(len(scores), -1, plan.keys.groups, slots).sum(1)
