"""Hopper: five trits to a byte, where blocks of scales end inside bytes.

For few rows the blocks of a step are columns of the product: x is repeated for each of
them, with zeros outside the block, in columns that wgmma's eight would leave empty
anyway. So one pass over a plane gives the sums of every block, which are scaled in
float32, and a block may end anywhere. For many rows the scaled planes are added in
registers, and multiplied once.

The copy engine wants rows of 16n bytes. Where a row of a plane has fewer, 2 to 16 of
them are a row of the copy's, and a tile is filled by as many copies. What they read
beyond a row meets zeros of x.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_plan, hopper_ring
from pallas_kernels.hopper import LANES, PROCESSORS
from pallas_kernels.hopper_plan import Stream, Tuning
from pallas_kernels.hopper_ring import Place, Product, Ring
from pallas_kernels.plane_matmul import fragments
from pallas_kernels.plane_matmul.fragments import CHUNK, HELD

STEP = CHUNK * HELD  # inputs
MOST_COLUMNS = 32  # of the product in which blocks have columns of their own
MOST_REGIONS = 5  # of a thread's inputs with scales in its registers


@dataclasses.dataclass(frozen=True)
class Plan(hopper_plan.Plan):
    """All that is static about one call; ``inputs`` are those of whole steps.

    ``size`` inputs share scales (None: all), of which a row of W has ``blocks``; a row
    of x is ``columns`` of the product.
    """

    size: int | None
    blocks: int
    columns: int

    @property
    def bytes(self) -> int:
        """Of a plane's row in a step."""
        return self.tuning.inputs // HELD

    def first(self, step):
        """The block of the first column of a step; those of the others follow."""
        if self.size is None:
            return step * 0
        at = lax.div(step * self.tuning.inputs, jnp.int32(self.size))
        return lax.min(at, jnp.int32(self.blocks - self.columns))


def trit_matmul(x, planes, scales, *, block: int | None, interpret: bool, tuning=None):
    """``reference.plane_matmul`` of kind "trits" without bias, for x that is not empty.

    x is multiplied in bfloat16: wider x as two terms, high and low. Sums are float32,
    and so are scales for few rows, and for any of wider x; for many rows of bfloat16
    they are rounded to bfloat16, and so is each sum of scaled planes.
    NotImplementedError for outputs that are no multiple of 64.
    """
    inputs, (outputs, width) = x.shape[-1], planes[0].shape
    narrow, block = x.dtype == jnp.bfloat16, None if block == inputs else block
    _refuse(inputs, outputs, width, block)
    terms = hopper.terms(x)
    if tuning is None:
        shape = len(terms), inputs, outputs, block
        tuning = default_tuning(*shape, len(planes), not narrow)
    columns = _columns(block, tuning.inputs) if tuning.sums else 1
    if tuning.rows % columns or tuning.inputs % STEP:
        raise ValueError(f"{tuning}: accepted are {columns}n rows, {STEP}n inputs")
    steps = -(-width * HELD // tuning.inputs)
    steps += -steps % tuning.splits
    rows = columns * len(terms)
    rows += -rows % tuning.rows
    scales = [_filled(scale, columns) for scale in scales]
    plan = Plan(
        rows=rows,
        inputs=steps * tuning.inputs,
        outputs=outputs,
        block=None,
        narrow=narrow and columns == 1,
        tuning=tuning,
        size=block,
        blocks=scales[0].shape[1],
        columns=columns,
    )
    folded = 16 // math.gcd(width, 16)
    by_copy = (outputs // folded, folded * width)
    product = Product(
        plan,
        [Stream(_arranged(plan, terms), tuning.inputs, 2 * CHUNK)],
        [Stream(p.reshape(by_copy), plan.bytes, None, folded) for p in planes],
        scales,
        functools.partial(_consume, plan),
        fragments.WIDTHS,
    )
    y = product.run(interpret)
    if columns > 1:
        count = rows // columns
        y = y.reshape(count, columns, outputs).sum(1)
    return hopper.joined(y, x, outputs)


def _refuse(inputs: int, outputs: int, width: int, block: int | None) -> None:
    """NotImplementedError with the reason for what the kernel cannot serve."""
    if width != -(-inputs // HELD):
        raise ValueError(f"rows of {width} bytes for {inputs} inputs, five to a byte")
    if outputs % LANES:
        raise NotImplementedError(f"{outputs} outputs; wgmma needs a multiple of 64")
    if _columns(block, STEP) > LANES:
        raise NotImplementedError(
            f"blocks of {block} trits; a step of {STEP} inputs has 64 columns for them"
        )


def default_tuning(rows, inputs, outputs, block, count, exact=False) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many.

    ``exact`` keeps scales in float32 for many rows too.
    """
    columns = _columns(block, STEP)
    apart = exact or rows * columns <= MOST_COLUMNS
    apart = apart or fragments.regions(block) > MOST_REGIONS
    if apart:  # sums of every plane stand beside the total
        rows, unit = rows * columns, max(8, columns)
        most = max(unit, min(64, 128 // count) // unit * unit)
        share = -(-rows // -(-rows // most))
        tile = -(-share // unit) * unit
    else:
        tile = next((r for r in (8, 16, 32, 64) if rows <= r), 96)
    steps = -(-inputs // STEP)
    warpgroups, splits = _spread(-(-rows // tile), outputs, steps, tile, count)
    height = tile // 2 if not (apart or exact or splits > 1) else tile
    stages = hopper.depth(
        _stage(tile, warpgroups, count),
        LANES * warpgroups,
        height,
        -(-steps // splits),
    )
    return Tuning(tile, STEP, stages, splits, warpgroups, apart)


def _spread(tiles: int, outputs: int, steps: int, tile: int, count: int):
    """(warpgroups, splits) by what the busiest multiprocessor reads.

    Filling the ring and writing a result take as long as two steps. Splits of many rows
    would write much, so that there are two at most.
    """
    wide = outputs % (2 * LANES) == 0
    splits = (1, 2, 4, 8) if tile <= LANES else (1, 2)

    def time(made):
        warpgroups, split = made
        blocks = tiles * split * outputs // (LANES * warpgroups)
        turns = -(-blocks // PROCESSORS) * (-(-steps // split) + 2)
        return turns * _stage(tile, warpgroups, count)

    pairs = [(w, s) for w in (2, 1)[not wide :] for s in splits if s <= steps]
    return min(pairs, key=time)


def _stage(tile: int, warpgroups: int, count: int) -> int:
    """Bytes of a step in the ring."""
    return 2 * tile * STEP + count * LANES * warpgroups * CHUNK


def _columns(block: int | None, step: int) -> int:
    """Blocks of which a step may have inputs, up to a power of two."""
    if block is None:
        return 1
    parts = math.gcd(block, step)
    most = -(-(block - parts + step) // block)
    return 1 << (most - 1).bit_length()


def _filled(scale, columns: int):
    """Scales [out, blocks] of as many blocks as there are columns."""
    short = columns - scale.shape[1]
    return jnp.pad(scale, ((0, 0), (0, short))) if short > 0 else scale


def _arranged(plan: Plan, terms):
    """x [rows, inputs] in the kernel's order, each row once for each of its columns."""
    short = plan.inputs - terms.shape[1]
    x = jnp.pad(terms, ((0, 0), (0, short)))
    if plan.columns > 1:
        k = jnp.arange(plan.inputs, dtype=jnp.int32)
        first = plan.first(lax.div(k, jnp.int32(plan.tuning.inputs)))
        own = lax.div(k, jnp.int32(plan.size)) - first
        inside = own == jnp.arange(plan.columns, dtype=jnp.int32)[:, None]
        x = jnp.where(inside[None], x[:, None], 0).reshape(-1, plan.inputs)
    x = fragments.in_order(x)
    return jnp.pad(x, ((0, plan.rows - len(x)), (0, 0)))


def _consume(plan: Plan, ring: Ring, scales, place: Place):
    """The sums [64, rows] of this warpgroup over all steps, scaled."""
    if plan.tuning.sums:
        return _sums_apart(plan, ring, scales, place)
    rows, size = pl.ds(place.row, LANES), plan.size
    count, interpret = fragments.regions(size), ring.staged is not None
    load = functools.partial(fragments.region_scales, interpret=interpret)

    def fetch(i):
        """The scales of each chunk of step ``i``, plane by plane."""
        first = (place.first + i) * plan.tuning.inputs
        starts = [first + c * STEP for c in range(plan.tuning.inputs // STEP)]
        return [[load(ref, rows, at, size, count) for ref in scales] for at in starts]

    def multiply(accs, at, values):
        tiles = [tile.at[at] for tile in ring.w]
        for chunk, found in enumerate(values):
            parts = fragments.scaled_trits(
                tiles, place, chunk, found, count, interpret=interpret
            )
            _product(plan, ring, place, accs[0], parts, at, chunk)

    return hopper_ring.sums(plan, ring, fetch, multiply, constant=size is None)


def _sums_apart(plan: Plan, ring: Ring, scales, place: Place):
    """The same where every block and plane is summed apart."""
    rows, interpret = pl.ds(place.row, LANES), ring.staged is not None

    def fetch(i):
        """The scales of the columns of step ``i``, plane by plane."""
        here = pl.ds(plan.first(place.first + i), plan.columns)
        load = functools.partial(fragments.scale_tile, interpret=interpret)
        return [load(ref.at[rows, here], plan.tuning.rows) for ref in scales]

    def multiply(accs, at, _):
        for acc, tile in zip(accs, ring.w, strict=True):
            for chunk in range(plan.bytes // CHUNK):
                parts = fragments.trits(tile.at[at], place, chunk, interpret=interpret)
                _product(plan, ring, place, acc, parts, at, chunk)

    total = hopper_ring.sums_of_blocks(
        plan, ring, fetch, multiply, lambda values: values, len(scales)
    )
    return total * fragments.FACTOR


def _product(plan: Plan, ring: Ring, place: Place, acc, parts, at, chunk: int) -> None:
    """acc += W x^T of a chunk."""
    first = chunk * STEP
    for index, part in enumerate(parts):
        width = part.shape[1]
        inputs = ring.x[0].at[at, :, pl.ds(first, width)]
        part = hopper_ring.operand(ring, index, place, part)
        plgpu.wgmma(acc, part, compat.transposed(inputs))
        plgpu.wgmma_wait(1)  # the part before is done
        first += width
