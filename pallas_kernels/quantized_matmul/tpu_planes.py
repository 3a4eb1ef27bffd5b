"""The TPU kernel behind every packed product: y = sum over planes of x W_plane.

A plane holds codes of 1, 2, 4 or 8 bits, [out, in] with ``in`` packed in the minor
axis, exactly as stored. A byte holds neighbouring inputs, so codes peeled from a row
of bytes with one shift belong to every second (4 bits), fourth ... input: ``x`` is put
in that order instead of the weights (``interleaved``), 128 bytes at a time.

Two bodies share everything but the place of the scale:

* ``folded`` (many rows): codes times scale go to a bfloat16 tile, one long product
  follows. The scale of each block is spread over the lanes by a product with 0/1.
* ``split`` (few rows): row b M + m of the left operand is row m of x where block b is,
  zero elsewhere; the product then keeps blocks apart, and the scale multiplies a few
  rows of float32 partial sums instead of the whole weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 32  # of bytes
FEW = 64  # rows of a decoding step
VMEM = 40 * 2**20
NT = (((1,), (1,)), ((), ()))  # contract the minor axes: x W^T
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the codes of a plane of ``part`` bits become small integers.

    Codes stand in the high bits of an int8 (``signed``: the value is the integer over
    2^(8 - part), after ``flip``) or in its low bits. ``flip`` is xored in: 0x80 centres
    an offset code, 0 leaves two's complement. ``fill`` is set below the code: half a
    step, which makes one bit -1/2 or +1/2. ``levels`` are looked up by the low bits.
    ``factor`` multiplies the result.
    """

    part: int
    signed: bool = True
    flip: int = 0x80
    fill: int = 0
    levels: tuple[float, ...] | None = None
    factor: float = 1.0

    @property
    def phases(self) -> int:
        return 8 // self.part

    @property
    def multiplier(self) -> float:
        """What the scale is multiplied by, since ``read`` leaves codes shifted."""
        return self.factor * (2.0 ** (self.part - 8) if self.signed else 1.0)

    def read(self, words, phase: int):
        """int8 (or the level) of the codes of one phase, from int32 words of bytes."""
        low = phase * self.part
        if self.signed:
            up = 8 - self.part - low
            mask = _bytes(0xFF & (0xFF << (8 - self.part)))
            high = lax.shift_left(words, jnp.int32(up)) if up else words
            value = high & mask if self.part < 8 else high
            value = value ^ _bytes(self.flip) if self.flip else value
            value = value | _bytes(self.fill) if self.fill else value
        else:
            down = lax.shift_right_logical(words, jnp.int32(low)) if low else words
            value = down & _bytes(2**self.part - 1)
        codes = pltpu.bitcast(value, jnp.int8)
        return codes if self.levels is None else _look_up(self.levels, codes)


def _bytes(value: int) -> Array:
    """A byte repeated through an int32 word."""
    word = int.from_bytes(bytes([value]) * 4, "little", signed=True)
    return jnp.int32(word)


def _look_up(levels: tuple[float, ...], codes):
    """levels[codes] by a gather within the lanes of a table."""
    index = codes.astype(jnp.int32)
    lane = lax.broadcasted_iota(jnp.int32, index.shape, 1)
    table = functools.reduce(
        lambda rest, level: jnp.where(lane == level[0], level[1], rest),
        enumerate(levels),
        jnp.zeros(index.shape, jnp.float32),
    )
    return jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes: ``rows`` of x, ``columns`` of y, ``inputs`` a step.

    ``split`` keeps blocks apart in the product (few rows) instead of folding the scale
    into the weight.
    """

    rows: int
    columns: int
    inputs: int
    split: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """How bytes, blocks of scale and lanes divide each other."""

    inputs: int
    block: int  # inputs that share a scale
    readings: tuple[Reading, ...]

    def __post_init__(self):
        for reading in self.readings:
            if self.inputs % reading.phases or self.row(reading) % self.lanes(reading):
                raise NotImplementedError(
                    f"{self.inputs} inputs of {reading.part} bits are no whole number "
                    f"of {LANES}-byte pieces"
                )
            slot, span = self.slot(reading), self.span(reading)
            if self.blocks > 1 and (
                self.inputs % self.block
                or self.block % reading.phases
                or self.lanes(reading) % slot
                or span % slot
            ):
                raise NotImplementedError(
                    f"blocks of {self.block} among {self.inputs} inputs do not divide "
                    f"the {LANES} lanes at {reading.part} bits"
                )

    @property
    def blocks(self) -> int:
        return -(-self.inputs // self.block)

    @property
    def parts(self) -> list[int]:
        """The widths of plane, each once."""
        return list(dict.fromkeys(r.part for r in self.readings))

    def row(self, reading: Reading) -> int:
        """Bytes of one output."""
        return self.inputs // reading.phases

    def lanes(self, reading: Reading) -> int:
        """Bytes of one piece: 128, or the whole of a short row."""
        return min(LANES, self.row(reading))

    def span(self, reading: Reading) -> int:
        """Bytes of one block."""
        return self.block // reading.phases

    def slot(self, reading: Reading) -> int:
        """Bytes of one piece that share a scale."""
        return max(1, min(self.span(reading), self.lanes(reading)))

    def slots(self, reading: Reading) -> int:
        return self.lanes(reading) // self.slot(reading)

    def tile(self, wanted: int) -> int:
        """The largest dividing number of inputs up to ``wanted``, in whole pieces."""
        unit = max(self.lanes(r) * r.phases for r in self.readings)
        pieces = self.inputs // unit
        fits = [n for n in range(1, pieces + 1) if pieces % n == 0]
        return unit * max(n for n in fits if n == 1 or n * unit <= wanted)

    def tuning(self, rows: int, outputs: int) -> Tuning:
        """Tiles for these shapes: long and thin for few rows, square for many."""
        split = rows * max(map(self.slots, self.readings)) <= 64
        return Tuning(
            rows=min(rows, 1024),
            columns=min(outputs, 512),
            inputs=self.tile(4096 if rows <= FEW else 1024),
            split=split,
        )


@dataclasses.dataclass(frozen=True)
class Groups:
    """The split body's rows: ``pieces[i]`` pieces of plane i share eight sublanes."""

    rows: int
    pieces: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, rows: int, inputs: int) -> Groups:
        """As many pieces together as fill eight rows; rows padded where none do."""
        rows = rows if rows < 8 else -(-rows // 8) * 8
        while True:
            pieces = tuple(
                math.gcd(
                    max(1, 8 // (plan.slots(r) * rows))
                    if plan.span(r) <= plan.lanes(r)
                    else 1,
                    inputs // (plan.lanes(r) * r.phases),
                )
                for r in plan.readings
            )
            heights = (
                n * plan.slots(r) * rows
                for n, r in zip(pieces, plan.readings, strict=True)
            )
            if all(height % 8 == 0 for height in heights):
                return cls(rows, pieces)
            rows += 1


def interleaved(x, phases: int, lanes: int):
    """x with its inputs in the order of the codes: piece, phase, byte."""
    rows, inputs = x.shape
    pieces = x.reshape(rows, inputs // (phases * lanes), lanes, phases)
    return pieces.swapaxes(2, 3).reshape(rows, inputs)


def _permute(x_ref, out_ref, *, phases: int, lanes: int):
    """``interleaved`` by a product with a permutation, piece by piece."""
    width = phases * lanes
    place = lax.broadcasted_iota(jnp.int32, (width, width), 1)
    source = place % lanes * phases + place // lanes
    chosen = source == lax.broadcasted_iota(jnp.int32, (width, width), 0)
    chosen = chosen.astype(x_ref.dtype)
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    for start in range(0, x_ref.shape[1], width):
        moved = lax.dot_general(
            x_ref[:, start : start + width],
            chosen,
            NN,
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        out_ref[:, start : start + width] = moved.astype(out_ref.dtype)


def in_order(x, plan: Plan, reading: Reading, interpret: bool):
    """``interleaved`` x: few rows by XLA, which would copy many rows several times."""
    lanes, phases = plan.lanes(reading), reading.phases
    if phases == 1 or len(x) <= FEW:
        return interleaved(x, phases, lanes)
    rows, inputs = min(len(x), 256), plan.tile(2048)
    tile = pl.BlockSpec((rows, inputs), lambda m, k: (m, k))
    return pl.pallas_call(
        functools.partial(_permute, phases=phases, lanes=lanes),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(pl.cdiv(len(x), rows), plan.inputs // inputs),
        in_specs=[tile],
        out_specs=tile,
        interpret=interpret,
        name="order_inputs",
    )(x)


def block_sums(x, plan: Plan):
    """float32 sums of x over each block: many rows by a product with 0/1."""
    if len(x) <= FEW:
        return x.astype(jnp.float32).reshape(len(x), plan.blocks, -1).sum(-1)
    own = jnp.arange(plan.inputs)[:, None] // plan.block == jnp.arange(plan.blocks)
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    own = own.astype(x.dtype)
    return jnp.dot(x, own, precision=exact, preferred_element_type=jnp.float32)


def _activations(x, plan: Plan, groups, interpret: bool) -> list:
    """What each width of plane is multiplied with."""
    found = {}
    for i, reading in enumerate(plan.readings):
        if reading.part not in found:
            own = in_order(x, plan, reading, interpret)
            if groups:
                own = separated(own, plan, reading, groups.pieces[i])
            found[reading.part] = own
    return list(found.values())


def separated(x, plan: Plan, reading: Reading, group: int):
    """Row b M + m: row m of ordered x where slot b of its group is, zero elsewhere."""
    inputs = x.shape[1]
    lanes = plan.lanes(reading)
    place = jnp.arange(inputs)
    byte = place // (lanes * reading.phases) % group * lanes + place % lanes
    slots = jnp.arange(group * plan.slots(reading))
    here = byte // plan.slot(reading) == slots[:, None]
    return jnp.where(here[:, None], x[None], 0).reshape(-1, inputs)


def _halves(values) -> tuple[Array, ...]:
    """bfloat16 terms whose sum is the values to 2^-17."""
    high = values.astype(jnp.bfloat16)
    if values.dtype == jnp.bfloat16:
        return (high,)
    wide = values.astype(jnp.float32)
    return high, (wide - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _dot(a, b, dimensions=NN):
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _precise(a, b):
    """a b of float32 values in three bfloat16 products."""
    (a0, a1), (b0, b1) = _halves(a), _halves(b)
    return _dot(a0, b0) + (_dot(a0, b1) + _dot(a1, b0))


def _words(plane_ref, start: int, lanes: int):
    """A piece of the stored bytes, four outputs to an int32 word."""
    return pltpu.bitcast(plane_ref[:, start : start + lanes], jnp.int32)


def _spread(scale, plan: Plan, reading: Reading, start, count: int):
    """The scale [blocks, outputs] of each of ``count`` bytes, by a 0/1 product."""
    shape = (plan.blocks, count)
    byte = start + lax.broadcasted_iota(jnp.int32, shape, 1)
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    inside = (byte // plan.span(reading) == block).astype(jnp.bfloat16)
    return sum(_dot(h, inside, TN) for h in _halves(scale)) * reading.multiplier


def _folded(x, plane_ref, scale, acc_ref, tile_ref, *, plan, reading, step):
    """acc += x (codes scale)^T; the weight's tile is built in VMEM first."""
    lanes, count = plan.lanes(reading), plane_ref.shape[1]
    for start in range(0, count, lanes):
        words = _words(plane_ref, start, lanes)
        factor = _spread(scale, plan, reading, step * count + start, lanes)
        for phase in range(reading.phases):
            value = reading.read(words, phase).astype(jnp.float32) * factor
            to = start * reading.phases + phase * lanes
            tile_ref[:, to : to + lanes] = value.astype(tile_ref.dtype)
    acc_ref[...] += _dot(x, tile_ref[...], NT)


def _scale_rows(scale, plan: Plan, reading: Reading, group: int, height: int, start):
    """The scale that multiplies each row of partial sums: [groups height, outputs]."""
    lanes, slot = plan.lanes(reading), plan.slot(reading)
    slots = group * plan.slots(reading)
    groups = start[1] // (group * lanes)
    shape = (groups * height, plan.blocks)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    within = row % height // (height // slots)
    byte = start[0] + row // height * (group * lanes) + within * slot
    block = jnp.minimum(byte // plan.span(reading), plan.blocks - 1)
    chosen = block == lax.broadcasted_iota(jnp.int32, shape, 1)
    chosen = chosen.astype(jnp.bfloat16)
    return sum(_dot(chosen, h) for h in _halves(scale)) * reading.multiplier


def _split(x, plane_ref, scale, acc_ref, *, plan, reading, group, step):
    """acc[b M + m] += scale_b (x_m where block b is) codes^T, group by group."""
    lanes, count, height = plan.lanes(reading), plane_ref.shape[1], x.shape[0]
    factors = _scale_rows(scale, plan, reading, group, height, (step * count, count))
    total = jnp.zeros(acc_ref.shape, jnp.float32)
    for index, first in enumerate(range(0, count, group * lanes)):
        sums = jnp.zeros(acc_ref.shape, jnp.float32)
        for start in range(first, first + group * lanes, lanes):
            words = _words(plane_ref, start, lanes)
            for phase in range(reading.phases):
                codes = reading.read(words, phase).astype(x.dtype)
                at = start * reading.phases + phase * lanes
                sums += _dot(x[:, at : at + lanes], codes, NT)
        total += sums * factors[index * height : (index + 1) * height]
    acc_ref[...] += total


def _fold_rows(partial, rows: int):
    """y[m] = sum over b of partial[b M + m]."""
    height = partial.shape[0]
    if rows % 8 == 0:
        return partial.reshape(height // rows, rows, -1).sum(0)
    shape = (rows, height)
    own = lax.broadcasted_iota(jnp.int32, shape, 1) % rows
    mine = (own == lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)
    return lax.dot_general(
        mine,
        partial,
        NN,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _body(*refs, plan: Plan, tuning: Tuning, groups, counts, shift):
    """One step of the grid (rows, outputs, inputs)."""
    it = iter(refs)
    x, planes, scales, extra, sums, low_rank = (
        [next(it) for _ in range(count)] for count in counts
    )
    out_ref, *scratch = it
    step = pl.program_id(2)
    accumulators = scratch if tuning.split else scratch[:1]

    @pl.when(step == 0)
    def _():
        for acc_ref in accumulators:
            acc_ref[...] = jnp.zeros_like(acc_ref)

    for i, reading in enumerate(plan.readings):
        scale = scales[i % len(scales)][...]
        own_x = x[plan.parts.index(reading.part)][...]
        same = {"plan": plan, "reading": reading, "step": step}
        if tuning.split:
            group = groups.pieces[i]
            _split(own_x, planes[i], scale, accumulators[i], group=group, **same)
        else:
            _folded(own_x, planes[i], scale, *scratch, **same)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        if tuning.split:
            y = sum(_fold_rows(acc[...], tuning.rows) for acc in accumulators)
        else:
            y = accumulators[0][...]
        if sums:
            offsets = shift(*(ref[...] for ref in (*scales, *extra)))
            y += _precise(sums[0][...], offsets.astype(jnp.float32))
        if low_rank:
            y += _dot(low_rank[0][...], low_rank[1][...])
        out_ref[...] = y.astype(out_ref.dtype)


def product(
    x,
    planes: tuple,
    scales: tuple,
    readings: tuple[Reading, ...],
    *,
    block: int | None,
    shift: Callable | None = None,
    extra: tuple = (),
    low_rank: tuple | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
):
    """y = sum_p x (scale_p code_p)^T + sums(x) shift(scales, extra)^T + (x L) R.

    ``scales`` and ``extra`` are [out, blocks] (one scale per plane, or one for all);
    ``shift`` makes from their transposed tiles what multiplies the block sums of x.
    Leading axes of x are rows. NotImplementedError says what the lanes cannot serve.
    """
    outputs, inputs = planes[0].shape[0], x.shape[-1]
    rows = x.reshape(-1, inputs)
    if outputs % SUBLANES or not len(rows):
        raise NotImplementedError(
            f"{len(rows)} rows, {outputs} outputs: accepted are at least one row and "
            f"a multiple of {SUBLANES} outputs"
        )
    blocks = scales[0].shape[-1]
    plan = Plan(inputs, inputs if blocks == 1 else block, readings)
    tuning = tuning or plan.tuning(len(rows), outputs)
    # Narrow arrays lie on a TPU with the long axis minor: transposing moves nothing.
    scales, extra = (tuple(a.T for a in group) for group in (scales, extra))
    y = _call(rows, planes, scales, extra, shift, low_rank, plan, tuning, interpret)
    return y[: len(rows)].reshape(*x.shape[:-1], outputs)


def _call(x, planes, scales, extra, shift, low_rank, plan, tuning, interpret):
    """Order the activations, then one kernel over (rows, outputs, inputs)."""
    outputs, dtype = planes[0].shape[0], x.dtype
    groups = None
    if tuning.split:
        groups = Groups.of(plan, len(x), tuning.inputs)
        x = jnp.pad(x, ((0, groups.rows - len(x)), (0, 0)))
        tuning = dataclasses.replace(tuning, rows=groups.rows)
    ordered = _activations(x, plan, groups, interpret)
    sums = () if shift is None else (block_sums(x, plan),)
    low = ()
    if low_rank is not None:
        left, right = low_rank
        low = (jnp.dot(x, left.astype(dtype)), right.astype(dtype))
    bm, bn, bk = tuning.rows, tuning.columns, tuning.inputs

    def row_blocks(arrays):
        return [pl.BlockSpec((bm, a.shape[1]), lambda m, n, k: (m, 0)) for a in arrays]

    def column_blocks(arrays):
        return [pl.BlockSpec((a.shape[0], bn), lambda m, n, k: (0, n)) for a in arrays]

    heights = {
        p: len(a) if groups else bm for p, a in zip(plan.parts, ordered, strict=True)
    }
    in_specs = [
        *(pl.BlockSpec((h, bk), lambda m, n, k: (m, k)) for h in heights.values()),
        *(
            pl.BlockSpec((bn, bk // r.phases), lambda m, n, k: (n, k))
            for r in plan.readings
        ),
        *column_blocks((*scales, *extra)),
        *row_blocks((*sums, *low[:1])),
        *column_blocks(low[1:]),
    ]
    if tuning.split:
        scratch = [
            pltpu.VMEM((heights[r.part], bn), jnp.float32) for r in plan.readings
        ]
    else:
        scratch = [pltpu.VMEM((bm, bn), jnp.float32), pltpu.VMEM((bn, bk), dtype)]
    operands = [ordered, planes, scales, extra, sums, low]
    return pl.pallas_call(
        functools.partial(
            _body,
            plan=plan,
            tuning=tuning,
            groups=groups,
            counts=tuple(map(len, operands)),
            shift=shift,
        ),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), dtype),
        grid=(pl.cdiv(len(x), bm), pl.cdiv(outputs, bn), plan.inputs // bk),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="packed_product",
    )(*(a for group in operands for a in group))
