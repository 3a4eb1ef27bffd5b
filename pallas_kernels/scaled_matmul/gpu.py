"""Hopper: 8-bit tiles from memory to wgmma through shared memory, scales on the sums.

out^T = W x^T, so that few rows of x still fill wgmma's 64 rows with outputs. A producer
warpgroup feeds a ring of tiles through the copy engine. Hopper sums float8 products
with about 14 bits (arXiv:2412.19437, section 3.3.2): those sums leave the tensor core
after every step and go on in float32; int8 products stay, exactly, in int32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels import tuning as tables
from pallas_kernels.hopper import LANES
from pallas_kernels.scaled_matmul.reference import check


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tiles: rows of x, inputs of a step, depth of the ring, splits of the inputs.

    ``splits`` blocks share an output tile; their float32 parts are summed outside,
    where XLA fuses the sum with what follows.
    """

    rows: int
    inputs: int
    stages: int = 4
    splits: int = 1
    warpgroups: int = 2


class Plan(NamedTuple):
    """All that is static about one call; a block of scales is ``width`` inputs."""

    rows: int
    inputs: int
    outputs: int
    width: int
    dtype: jnp.dtype
    narrow: bool
    tuning: Tuning

    @property
    def steps(self) -> int:
        return self.inputs // self.tuning.inputs // self.tuning.splits

    @property
    def tile(self) -> int:
        return LANES * self.tuning.warpgroups

    @property
    def partial(self) -> bool:
        """The kernel writes float32 out^T for each split."""
        return self.tuning.splits > 1 or not self.narrow

    @property
    def whole(self) -> bool:
        """One sum over all inputs: exact, and one scale."""
        return self.width == self.inputs and self.dtype == jnp.int8


class Ring(NamedTuple):
    """Tiles in shared memory, and barriers that say which are full and empty."""

    x: object
    w: object
    full: object
    empty: object


def scaled_matmul(
    x_codes,
    w_codes,
    x_scale,
    w_scale,
    *,
    block: int | None = None,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.scaled_matmul`` on Hopper's tensor cores.

    NotImplementedError where outputs are no multiple of 64, or inputs and blocks of 32.
    """
    hopper.require(interpret)
    width = check(x_codes, w_codes, x_scale, w_scale, block)
    lead, inputs, outputs = x_codes.shape[:-1], x_codes.shape[-1], len(w_codes)
    if not x_codes.size:
        return jnp.zeros((*lead, outputs), out_dtype)
    _refuse(inputs, outputs, width)
    rows = x_codes.size // inputs
    kind = x_codes.dtype
    if tuning is None:
        shape = (rows, inputs, outputs, width)
        name = f"scaled_matmul-{kind}"
        found = None if interpret else tables.look_up(name, shape)
        tuning = Tuning(**found) if found else default_tuning(*shape, kind)
    padding = ((0, -rows % tuning.rows), (0, 0))
    x = jnp.pad(x_codes.reshape(-1, inputs), padding)
    scale = jnp.pad(x_scale.reshape(-1, 1), padding)
    narrow = out_dtype == jnp.bfloat16
    plan = Plan(len(x), inputs, outputs, width, kind, narrow, tuning)
    with compat.interpret_gpu() if interpret else contextlib.nullcontext():
        y = _call(plan)(x, w_codes, scale, w_scale)
    if plan.partial:
        y = y.sum(0).T
    return y[:rows].astype(out_dtype).reshape(*lead, outputs)


def _refuse(inputs: int, outputs: int, width: int) -> None:
    if outputs % LANES:
        raise NotImplementedError(f"{outputs} outputs; wgmma needs a multiple of 64")
    if inputs % 32 or width % 32 or inputs % width:
        raise NotImplementedError(
            f"blocks of {width} of {inputs} inputs; wgmma needs whole multiples of 32"
        )


def default_tuning(rows, inputs, outputs, width, kind) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many."""
    exact = kind == jnp.int8 and width == inputs
    tile = next((r for r in (8, 16, 32, 64, 128) if rows <= r), 256 if exact else 128)
    # Float8 sums lose bits in the tensor core: after 128 inputs they go to float32.
    step = next(s for s in (128, 64, 32) if inputs % s == 0 and width % s == 0)
    steps = inputs // step
    warpgroups, split = hopper.spread(rows, tile, outputs, steps)
    lanes = LANES * warpgroups
    stages = hopper.depth((lanes + tile) * step, lanes, tile, steps // split)
    return Tuning(tile, step, stages, split, warpgroups)


def _call(plan: Plan):
    t = plan.tuning
    return plgpu.kernel(
        _kernel(plan),
        out_type=hopper.result_type(t.splits, plan.rows, plan.outputs, plan.partial),
        grid=(t.splits, plan.outputs // plan.tile, plan.rows // t.rows),
        grid_names=("split", "out", "row"),
        num_threads=t.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            out=hopper.result(t.warpgroups, t.rows, plan.partial),
            x=hopper.tiles((t.stages, t.rows, t.inputs), plan.dtype),
            w=hopper.tiles((t.stages, plan.tile, t.inputs), plan.dtype),
            full=plgpu.Barrier(num_barriers=t.stages, num_arrivals=2),
            empty=plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.warpgroups),
        ),
    )


def _kernel(plan: Plan):
    """The body: one warpgroup copies, the others multiply."""
    t = plan.tuning

    def body(x_g, w_g, x_scale, w_scale, y, *, out, x, w, full, empty):
        ring = Ring(x, w, full, empty)
        split, n, m = (lax.axis_index(name) for name in ("split", "out", "row"))
        warpgroup = lax.axis_index("warpgroup")
        first = split * plan.steps

        @pl.when(warpgroup == t.warpgroups)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            rows = (pl.ds(m * t.rows, t.rows), pl.ds(n * plan.tile, plan.tile))
            _produce(plan, ring, (x_g, w_g), rows, first)

        @pl.when(warpgroup < t.warpgroups)
        def _():
            plgpu.set_max_registers(232, action="increase")
            here = pl.ds(n * plan.tile + warpgroup * LANES, LANES)
            rows = pl.ds(m * t.rows, t.rows)
            total = _consume(plan, ring, w_scale, first, here, warpgroup)
            by_row = hopper.column(x_scale, rows, 0, plgpu.Layout.WGMMA.reduce(0))
            total = total * lax.broadcast_in_dim(by_row, (LANES, t.rows), [1])
            hopper.store(total, out.at[warpgroup], y, split, here, rows, plan.partial)

    return body


def _produce(plan: Plan, ring: Ring, refs, rows, first) -> None:
    """Keep the ring full of tiles of x and W."""
    stages, width = plan.tuning.stages, plan.tuning.inputs

    @pl.loop(0, plan.steps)
    def _(i):
        at = lax.rem(i, stages)
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(ring.empty.at[at]))
        inputs = pl.ds((first + i) * width, width)
        for ref, here, tile in zip(refs, rows, ring[:2], strict=True):
            source = ref.at[here, inputs]
            plgpu.copy_gmem_to_smem(source, tile.at[at], ring.full.at[at])


def _consume(plan: Plan, ring: Ring, w_scale, first, here, warpgroup):
    """Sums [64, rows] over all steps, times the weight's scales, in float32."""
    t = plan.tuning
    kind = jnp.int32 if plan.dtype == jnp.int8 else jnp.float32
    tile = plgpu.ACC((LANES, t.rows), kind)

    def multiply(acc, i):
        at = lax.rem(i, t.stages)
        plgpu.barrier_wait(ring.full.at[at])
        weights = ring.w.at[at, pl.ds(warpgroup * LANES, LANES)]
        plgpu.wgmma(acc, weights, compat.transposed(ring.x.at[at]))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.empty.at[at])

    def scale(i):
        block = (first + i) // (plan.width // t.inputs)
        return hopper.column(w_scale, here, block)

    if plan.whole:

        def scope(acc):
            pl.loop(0, plan.steps)(lambda i: multiply(acc, i))
            return acc[...]

        total = pl.run_scoped(scope, tile).astype(jnp.float32)
        return total * hopper.across(scale(0), t.rows)

    def step(i, carry):
        total, by = carry
        ahead = scale(lax.min(i + 1, plan.steps - 1))

        def scope(acc):
            multiply(acc, i)
            return acc[...]

        part = pl.run_scoped(scope, tile).astype(jnp.float32)
        return total + part * hopper.across(by, t.rows), ahead

    start = (hopper.zeros(t.rows), scale(0))
    return lax.fori_loop(0, plan.steps, step, start)[0]
