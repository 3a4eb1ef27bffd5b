"""Hopper: the list of active blocks steers the copies of a ring of weight tiles.

out^T = W^T x^T, so that few rows of x still fill wgmma's 64 rows with outputs; wgmma
takes W [in, out] as it is stored, from shared memory. A block of threads owns a tile of
outputs and every ``splits``-th step of the list: with any ``count`` the shares differ
by a step at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.gated_matmul.reference import check
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Tiles, Tuning

__all__ = ["Tuning", "default_tuning", "gated_matmul"]

CHUNK = 64  # inputs of a swizzled row of x


@dataclasses.dataclass(frozen=True)
class Plan(Tiles):
    """All that is static about one call; ``slots`` bounds the listed blocks."""

    rows: int
    outputs: int
    block: int
    slots: int
    narrow: bool  # x and the result are bfloat16
    terms: int  # bfloat16 terms of float32 weights; 0: they are bfloat16
    tuning: Tuning  # its splits are of the list


class Ring(NamedTuple):
    """Tiles in shared memory, and barriers that say which are full and empty."""

    x: Any
    w: Any
    full: Any
    empty: Any
    terms: Any = None  # of a tile of float32 weights, for each warpgroup


def gated_matmul(
    x,
    w,
    index,
    count,
    *,
    block: int = 128,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.gated_matmul`` for at most 256 rows, on Hopper's tensor cores.

    Sums are float32. x is multiplied in bfloat16: wider x as two terms, high and low,
    and float32 weights that meet it as well. NotImplementedError for blocks or outputs
    that are no multiple of 64, and for weights of other dtypes.
    """
    hopper.require(interpret)
    check(x, w, index, block)
    inputs, outputs, slots = x.shape[-1], w.shape[1], len(index)
    if not x.size or not slots:
        return jnp.zeros((*x.shape[:-1], outputs), x.dtype)
    _refuse(x.size // inputs, outputs, block, w.dtype)
    rows, narrow = hopper.terms(x), x.dtype == jnp.bfloat16
    terms = 0 if w.dtype == jnp.bfloat16 else 2 - narrow
    if tuning is None:
        tuning = default_tuning(len(rows), slots, outputs, block, terms)
    many = jnp.pad(rows, ((0, -len(rows) % tuning.rows), (0, 0)))
    plan = Plan(len(many), outputs, block, slots, narrow, terms, tuning)
    numbers = index.astype(jnp.int32), count.astype(jnp.int32).reshape(1)
    with compat.interpret_gpu() if interpret else contextlib.nullcontext():
        y = _call(plan)(*numbers, many, w)
    return hopper.joined(y.sum(0).T if plan.partial else y, x, outputs)


def _refuse(rows: int, outputs: int, block: int, dtype) -> None:
    """NotImplementedError with the reason for what the kernel cannot serve."""
    if block % CHUNK or outputs % LANES:
        raise NotImplementedError(
            f"{outputs} outputs of blocks of {block} inputs; accepted are multiples of "
            f"{LANES} and {CHUNK}"
        )
    if rows > 256:
        raise NotImplementedError(f"{rows} rows: a gate that all share is for decode")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{dtype} weights; accepted: bfloat16 and float32")


def default_tuning(rows, slots, outputs, block, terms=0) -> Tuning:
    """By the roofline: fill all multiprocessors, two blocks each where rows are few."""
    tile = next((r for r in (8, 16, 32, 64) if rows <= r), 128)
    size = 4 if terms else 2
    for step in (2 * CHUNK, CHUNK):
        if block % step or (terms and step > CHUNK):
            continue
        steps = slots * (block // step)
        # Any number of steps can be split.
        warpgroups, splits = hopper.spread(rows, tile, outputs, -(-steps // 8) * 8)
        lanes, share = LANES * warpgroups, -(-steps // splits)
        resident = 2 if tile <= 32 and not terms else 1
        room = hopper.SHARED // resident - 2 * terms * step * lanes
        stage = step * (2 * tile + size * lanes)
        stages = hopper.depth(stage, lanes, tile, share, room)
        if stages >= min(3, share):
            break
    return Tuning(tile, step, stages, splits, warpgroups)


def _call(plan: Plan):
    t = plan.tuning
    stored = jnp.float32 if plan.terms else jnp.bfloat16
    scratch = dict(
        out=hopper.result(t.warpgroups, t.rows, plan.partial),
        x=hopper.tiles((t.stages, t.rows, t.inputs), jnp.bfloat16),
        w=hopper.tiles((t.stages, t.inputs, plan.tile), stored),
        full=plgpu.Barrier(num_barriers=t.stages, num_arrivals=2),
        empty=plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.warpgroups),
    )
    if plan.terms:
        shape = (t.warpgroups, plan.terms, t.inputs, LANES)
        scratch["terms"] = hopper.tiles(shape, jnp.bfloat16)
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=hopper.result_type(t.splits, plan.rows, plan.outputs, plan.partial),
        grid=(t.splits, plan.outputs // plan.tile, plan.rows // t.rows),
        grid_names=("split", "out", "row"),
        num_threads=t.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
    )


def _kernel(plan: Plan, *refs, out, **scratch):
    """One warpgroup copies what is listed, the others multiply it."""
    index, count, x, w, y = refs
    t, ring = plan.tuning, Ring(**scratch)
    split, n, m = (lax.axis_index(name) for name in ("split", "out", "row"))
    warpgroup = lax.axis_index("warpgroup")
    listed = lax.max(lax.min(count[0], plan.slots), 0)
    total = listed * (plan.block // t.inputs)
    steps = lax.div(total - split + (t.splits - 1), t.splits)

    @pl.when(warpgroup == t.warpgroups)
    def _():
        rows, outputs = pl.ds(m * t.rows, t.rows), pl.ds(n * plan.tile, plan.tile)
        _produce(plan, ring, (index, x, w), (rows, outputs), split, steps)

    @pl.when(warpgroup < t.warpgroups)
    def _():
        here = pl.ds(n * plan.tile + warpgroup * LANES, LANES)
        rows = pl.ds(m * t.rows, t.rows)
        sums = _consume(plan, ring, warpgroup, steps)
        hopper.store(sums, out.at[warpgroup], y, split, here, rows, plan.partial)


def _produce(plan: Plan, ring: Ring, refs, place, split, steps) -> None:
    """Keep the ring full of the tiles of x and W of this split's steps.

    Block numbers are read ahead of their use: those of the first tiles together.
    """
    t, (index, x, w), (rows, outputs) = plan.tuning, refs, place
    parts = plan.block // t.inputs

    def tile(i):
        """The tile of inputs of step ``i``; beyond the list one of its last entry."""
        step = split + i * t.splits
        block = index[lax.min(lax.div(step, parts), plan.slots - 1)]
        return block * parts + lax.rem(step, parts)

    def fetch(at, tile):
        inputs, full = pl.ds(tile * t.inputs, t.inputs), ring.full.at[at]
        plgpu.copy_gmem_to_smem(w.at[inputs, outputs], ring.w.at[at], full)
        plgpu.copy_gmem_to_smem(x.at[rows, inputs], ring.x.at[at], full)

    for at, first in enumerate([tile(i) for i in range(t.stages)]):
        pl.when(at < steps)(lambda at=at, first=first: fetch(at, first))

    def step(i, now):
        ahead, at = tile(i + 1), lax.rem(i, t.stages)
        plgpu.barrier_wait(ring.empty.at[at])
        fetch(at, now)
        return ahead

    lax.fori_loop(t.stages, steps, step, tile(t.stages))


def _consume(plan: Plan, ring: Ring, warpgroup, steps):
    """The sums [64, rows] of a warpgroup over the steps of its split."""
    t, own = plan.tuning, pl.ds(warpgroup * LANES, LANES)

    def scope(acc):
        @pl.loop(0, steps)
        def _(i):
            at = lax.rem(i, t.stages)
            plgpu.barrier_wait(ring.full.at[at])
            weights = [ring.w.at[at, :, own]]
            if plan.terms:
                weights = _terms(plan, ring, weights[0], warpgroup)
            for tile in weights:
                inputs = compat.transposed(ring.x.at[at])
                plgpu.wgmma(acc, compat.transposed(tile), inputs)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.empty.at[at])

        return acc[...]

    return pl.run_scoped(scope, plgpu.ACC((LANES, t.rows)))


def _terms(plan: Plan, ring: Ring, tile, warpgroup) -> list:
    """The bfloat16 terms of a tile of float32 weights, in shared memory."""
    # Float32 rows of 128 bytes: threads of a warp meet in the same banks.
    values = compat.load(tile, plgpu.Layout.WGMMA, optimized=False)
    plgpu.commit_smem()  # every warp is done with the terms of the step before
    for i in range(plan.terms):
        term = values.astype(jnp.bfloat16)
        ring.terms[warpgroup, i] = term
        values = values - term.astype(jnp.float32)
    plgpu.commit_smem()
    return [ring.terms.at[warpgroup, i] for i in range(plan.terms)]
