"""Hopper: a thread has an output of a segment, and adds its run of entries.

A warpgroup has a segment of 128 outputs, a block of threads a group of eight; places,
values and x come from device memory through the cache of the multiprocessor, for runs
are short and neighbouring threads read neighbouring entries. A stripe's groups are
dealt to ``splits`` blocks, so that few stripes still fill the chip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.scattered_matmul import threads
from pallas_kernels.scattered_matmul.reference import check
from pallas_kernels.scattered_matmul.segments import (
    GROUP,
    SLOTS,
    STRIPE,
    WINDOW,
    Segments,
    unpack,
)

FEW = 128  # rows up to which the dense matrix costs more than it saves, by estimate
TILE = 8  # rows that a block of threads multiplies: of bfloat16 they are 16 bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about one call."""

    tile: int
    tiles: int
    stripes: int
    splits: int
    interpret: bool


def scattered_matmul(x, segments: Segments, *, outputs: int, interpret: bool = False):
    """``reference.scattered_matmul``; above 128 rows XLA scatters the dense matrix.

    Products and sums are float32.
    """
    hopper.require(interpret)
    check(x, segments, outputs)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        dense = unpack(segments, (x.shape[-1], outputs)).astype(x.dtype)
        return jnp.dot(x, dense, precision=lax.Precision.HIGHEST)
    if not x.size:
        return jnp.zeros((*x.shape[:-1], outputs), x.dtype)
    count, plan = len(rows), _plan(len(rows), segments, outputs, interpret)
    filled = jnp.pad(rows, ((0, -count % plan.tile), (0, 0)))
    turned = filled.reshape(plan.tiles, plan.tile, -1).swapaxes(1, 2)
    # The first group of each stripe; what is left behind the last belongs to none.
    bounds = jnp.searchsorted(
        segments.stripe, jnp.arange(plan.stripes + 1), method="compare_all"
    )
    with compat.interpret_gpu() if interpret else contextlib.nullcontext():
        parts = _call(plan)(bounds.astype(jnp.int32), *segments[1:], turned)
    y = parts.sum(0).transpose(1, 2, 0, 3).reshape(len(filled), -1)
    y = y[:count, :outputs].astype(x.dtype)
    return y.reshape(*x.shape[:-1], outputs)


def _plan(rows: int, segments: Segments, outputs: int, interpret: bool) -> Plan:
    tile = next(r for r in (1, 2, 4, TILE) if rows <= r or r == TILE)
    tiles, stripes = -(-rows // tile), -(-outputs // STRIPE)
    wanted = -(-hopper.PROCESSORS // (stripes * tiles))
    splits = min(wanted, -(-len(segments.stripe) // stripes))
    return Plan(tile, tiles, stripes, splits, interpret)


def _call(plan: Plan):
    shape = plan.splits, plan.stripes, plan.tiles, plan.tile, STRIPE
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(plan.stripes, plan.splits, plan.tiles),
        grid_names=("stripe", "split", "tile"),
        num_threads=GROUP,
        thread_name="warpgroup",
        scratch_types=dict(
            sums=plgpu.SMEM((GROUP, plan.tile, STRIPE), jnp.float32),
            met=plgpu.Barrier(num_arrivals=GROUP),
        ),
    )


def _kernel(plan: Plan, bounds, window, place, end, value, x, y, *, sums, met) -> None:
    """Each warpgroup adds its segments, then one row of what all of them have."""
    stripe, split, tile = (lax.axis_index(n) for n in ("stripe", "split", "tile"))
    own = lax.axis_index("warpgroup")
    first = bounds[stripe] + split
    groups = lax.div(bounds[stripe + 1] - first + (plan.splits - 1), plan.splits)

    def step(i, totals):
        segment = (first + i * plan.splits) * GROUP + own
        stored = place.at[segment], end.at[segment], value.at[segment]
        base = window[segment].astype(jnp.int32) * WINDOW
        return _add(plan, stored, base, x.at[tile], totals)

    nothing = plgpu.layout_cast(jnp.zeros(STRIPE, jnp.float32), threads.LINE)
    totals = lax.fori_loop(0, groups, step, (nothing,) * plan.tile)
    for row, total in enumerate(totals):
        sums[own, row] = total
    plgpu.commit_smem()
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)

    @pl.when(own < plan.tile)
    def _():
        lines = [compat.load(sums.at[i, own], threads.LINE) for i in range(GROUP)]
        y[split, stripe, tile, own] = sum(lines[1:], lines[0])


def _add(plan: Plan, stored, base, x, totals):
    """``totals``, a line [outputs] for each row, and the products of a segment."""
    places, ends, values = stored
    gather = functools.partial(threads.gather, interpret=plan.interpret)
    output = plgpu.layout_cast(lax.iota(jnp.int32, STRIPE), threads.LINE)
    stop = compat.load(ends, threads.LINE, optimized=False).astype(jnp.int32)
    (before,) = gather(ends, lax.max(output - 1, 0))
    start = jnp.where(output > 0, before.astype(jnp.int32), 0)

    def entry(i, totals):
        """The ``i``-th of each output; outputs that have fewer add zero."""
        at = start + i
        slot = lax.min(at, SLOTS - 1)
        (offset,), (weight,) = gather(places, slot), gather(values, slot)
        weight = jnp.where(at < stop, weight.astype(jnp.float32), 0.0)
        found = gather(x, base + offset.astype(jnp.int32))
        return tuple(
            total + weight * row.astype(jnp.float32)
            for total, row in zip(totals, found, strict=True)
        )

    longest = threads.largest(stop - start, interpret=plan.interpret)
    return lax.fori_loop(0, longest, entry, totals)
