"""Hopper: one warpgroup keeps a ring of tiles full, the others multiply what is there.

out^T = W x^T: few rows of x still fill wgmma's 64 rows with outputs, and weights may be
unpacked in registers, which wgmma takes on its left only. What a kernel adds is how
bytes become operands, of floats or of integers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_term
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Plan, Stream
from pallas_kernels.hopper_term import Term


class Ring(NamedTuple):
    """Tiles in shared memory, and barriers that say which are full and empty."""

    x: list
    w: list
    full: object
    empty: object
    staged: object = None  # only in the interpreter


class Place(NamedTuple):
    """The first step of this block of threads, a warpgroup, its first output (``row``
    of W), and the first row of x (``batch``)."""

    first: Any
    row: Any
    warpgroup: Any
    batch: Any


@dataclasses.dataclass(frozen=True)
class Product:
    """A call: operands of the ring, others in device memory, and what consumes them.

    ``consume(ring, others, place)`` returns a warpgroup's sums [64, rows] in float32.
    ``staged`` are widths of operands in shared memory, for the interpreter's wgmma,
    which takes none from registers. Each split of the inputs adds its share of
    ``term``, whose products wait until then.
    """

    plan: Plan
    x: Sequence[Stream]
    w: Sequence[Stream]
    others: Sequence[Any]
    consume: Callable
    staged: Sequence[int]
    term: Term | None = None

    def run(self, interpret: bool):
        """[rows, outputs], or where the plan is partial float32 of the same."""
        operands = (*(s.array for s in (*self.x, *self.w)), *self.others)
        operands += self.term or ()
        with compat.interpret_gpu() if interpret else contextlib.nullcontext():
            y = self._call(interpret)(*operands)
        return y.sum(0).T if self.plan.partial else y

    def _call(self, interpret: bool):
        plan, t = self.plan, self.plan.tuning
        copies = sum(stream.copies for stream in (*self.x, *self.w))
        scratch = dict(
            out=hopper.result(t.warpgroups, t.rows, plan.partial),
            x=[_tiles(t.stages, t.rows, stream) for stream in self.x],
            w=[_tiles(t.stages, plan.tile, stream) for stream in self.w],
            full=plgpu.Barrier(num_barriers=t.stages, num_arrivals=copies),
            empty=plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.warpgroups),
        )
        if interpret:
            scratch["staged"] = [
                plgpu.SMEM((t.warpgroups, LANES, width), self.x[0].array.dtype)
                for width in self.staged
            ]
        if self.term:
            scratch |= self.term.scratch(plan)
        return plgpu.kernel(
            self._body,
            out_type=hopper.result_type(
                t.splits, plan.rows, plan.outputs, plan.partial
            ),
            grid=(t.splits, plan.outputs // plan.tile, plan.rows // t.rows),
            grid_names=("split", "out", "row"),
            num_threads=t.warpgroups + 1,
            thread_name="warpgroup",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )

    def _body(self, *refs, out, x, w, full, empty, staged=None, **term):
        plan, t = self.plan, self.plan.tuning
        *others, y = refs[len(x) + len(w) :]
        others, pair = others[: len(self.others)], others[len(self.others) :]
        ring = Ring(x, w, full, empty, staged)
        split, n, m = (lax.axis_index(name) for name in ("split", "out", "row"))
        warpgroup = lax.axis_index("warpgroup")
        first = split * plan.steps

        @pl.when(warpgroup == t.warpgroups)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            if term:
                hopper_term.fetch(plan, pair, term, n * plan.tile, m * t.rows)
            self._produce(ring, refs, (first, n * plan.tile, m * t.rows))

        @pl.when(warpgroup < t.warpgroups)
        def _():
            plgpu.set_max_registers(232 if t.warpgroups < 3 else 152, action="increase")
            row = n * plan.tile + warpgroup * LANES
            place = Place(first, row, warpgroup, m * t.rows)
            total = self.consume(ring, others, place)
            if term:
                total = total + hopper_term.share(plan, term, warpgroup)
            here, rows = pl.ds(row, LANES), pl.ds(m * t.rows, t.rows)
            hopper.store(total, out.at[warpgroup], y, split, here, rows, plan.partial)

    def _produce(self, ring: Ring, refs, origin) -> None:
        """Keep the ring full: tiles of the weights and of the x that they meet."""
        plan, t = self.plan, self.plan.tuning
        first, n, m = origin
        moves = [
            (stream, (start, size), tiles)
            for streams, start, size, ring_tiles in (
                (self.x, m, t.rows, ring.x),
                (self.w, n, plan.tile, ring.w),
            )
            for stream, tiles in zip(streams, ring_tiles, strict=True)
        ]

        @pl.loop(0, plan.steps)
        def _(i):
            at = lax.rem(i, t.stages)
            pl.when(i >= t.stages)(lambda: plgpu.barrier_wait(ring.empty.at[at]))
            for ref, (stream, rows, tiles) in zip(refs, moves, strict=False):
                for source, tile in stream.moves(ref, tiles.at[at], rows, first + i):
                    plgpu.copy_gmem_to_smem(source, tile, ring.full.at[at])


def _tiles(stages: int, rows: int, stream: Stream):
    shape, dtype = (stages, rows, stream.columns), stream.array.dtype
    if stream.folded is not None:
        shape = stages, stream.folded, rows // stream.folded, stream.columns
    if stream.width is None:
        return plgpu.SMEM(shape, dtype)
    return hopper.tiles(shape, dtype, stream.width)


def sums(plan: Plan, ring: Ring, fetch, multiply, *, constant: bool, dtype=jnp.float32):
    """The sums [64, rows] of a warpgroup over all steps, of ``dtype``.

    ``fetch(i)`` loads what step i needs from device memory, a step ahead of its use,
    or once where it is ``constant``. ``multiply(accs, at, values)`` adds the products
    of what lies at ``at`` of the ring to the accumulator of each group of inputs.
    """
    once = fetch(0) if constant else None

    def scope(acc):
        def step(i, values):
            ahead = values if constant else fetch(lax.min(i + 1, plan.steps - 1))
            at = lax.rem(i, plan.tuning.stages)
            plgpu.barrier_wait(ring.full.at[at])
            multiply([acc] * plan.groups, at, values)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.empty.at[at])
            return ahead

        lax.fori_loop(0, plan.steps, step, once if constant else fetch(0))
        return acc[...]

    return pl.run_scoped(scope, plgpu.ACC((LANES, plan.tuning.rows), dtype))


def sums_of_blocks(
    plan: Plan,
    ring: Ring,
    fetch,
    multiply,
    scales,
    terms: int = 1,
    *,
    products=jnp.float32,
    dtype=jnp.float32,
):
    """The same where each block is summed apart, of ``products``, and then scaled.

    ``scales(values)`` are those of the accumulators: ``terms`` of each group, and of
    ``dtype``, like the result.
    """
    rows, count = plan.tuning.rows, plan.groups * terms

    def step(i, carry):
        total, values = carry
        ahead = fetch(lax.min(i + 1, plan.steps - 1))
        at = lax.rem(i, plan.tuning.stages)
        plgpu.barrier_wait(ring.full.at[at])

        def scope(*accs):
            multiply(accs, at, values)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in accs]

        parts = pl.run_scoped(scope, *[plgpu.ACC((LANES, rows), products)] * count)
        plgpu.barrier_arrive(ring.empty.at[at])
        for part, scale in zip(parts, scales(values), strict=True):
            total = total + part.astype(dtype) * hopper.across(scale, rows)
        return total, ahead

    start = hopper.zeros(rows).astype(dtype)
    return lax.fori_loop(0, plan.steps, step, (start, fetch(0)))[0]


def operand(ring: Ring, index: int, place: Place, part):
    """``part`` of W as wgmma's left operand."""
    if ring.staged is None:
        return part
    ring.staged[index][place.warpgroup] = part
    return ring.staged[index].at[place.warpgroup]


def by_row(plan: Plan, place: Place, ref, dtype=jnp.float32):
    """What a column in device memory holds for each row of x, over the 64 outputs."""
    rows = pl.ds(place.batch, plan.tuning.rows)
    column = hopper.column(ref, rows, 0, plgpu.Layout.WGMMA.reduce(0), dtype)
    return lax.broadcast_in_dim(column, (LANES, plan.tuning.rows), [1])


def by_output(plan: Plan, place: Place, ref):
    """The same for each output, over the rows of x."""
    column = hopper.column(ref, pl.ds(place.row, LANES), 0)
    return hopper.across(column, plan.tuning.rows)
