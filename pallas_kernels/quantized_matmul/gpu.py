"""Hopper: packed weights from memory to the tensor core's registers, never dense.

out^T = W x^T, because wgmma takes a register operand on its left only. A byte of W
holds 8 / part codes; x, which is small, is reordered outside so that the codes at one
place of their bytes meet one contiguous slice of x. A producer warpgroup feeds a ring
of tiles through the copy engine; the others turn bytes into operands and multiply.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels import tuning as tables
from pallas_kernels.hopper import LANES
from pallas_kernels.quantized_matmul import fragments
from pallas_kernels.quantized_matmul.gpu_plan import (
    Plan,
    Plane,
    Tuning,
    default_tuning,
    plan_of,
    refuse,
)


class Ring(NamedTuple):
    """Tiles in shared memory, and barriers that say which are full and empty."""

    x: list
    w: list
    full: object
    empty: object
    staged: object = None  # only in the interpreter


def quantized_matmul(
    x,
    planes,
    scale,
    zero=None,
    *,
    bits: int,
    block: int | None,
    levels: tuple[float, ...] | None = None,
    offset: float | None = None,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.quantized_matmul`` on Hopper's tensor cores.

    Sums are float32. x is multiplied in bfloat16: wider x as two terms, high and low,
    in one pass over W. Rounded to bfloat16 are tables (4 bits) and, for many rows of
    bfloat16, scaled weights. NotImplementedError where a block of inputs is no multiple
    of 16 bytes of each plane, rows of planes are not aligned to 16 bytes, or outputs
    to 64.
    """
    compat.require_hopper(interpret)
    if interpret and compat.VERSION < (0, 11):
        raise NotImplementedError("jax 0.10's interpreter cannot load single columns")
    lead, inputs = x.shape[:-1], x.shape[-1]
    outputs, narrow = len(planes[0]), x.dtype == jnp.bfloat16
    if not x.size:
        return jnp.zeros((*lead, outputs), x.dtype)
    terms = _terms(x.reshape(-1, inputs))
    rows = len(terms)
    refuse(inputs, outputs, bits, block, levels, planes)
    if tuning is None:
        shape = (rows, inputs, outputs, bits, block or inputs)
        found = None
        if narrow and not interpret:
            found = tables.look_up("quantized_matmul", shape)
        tuning = Tuning(**found) if found else default_tuning(*shape, not narrow)
    many = jnp.pad(terms, ((0, -rows % tuning.rows), (0, 0)))
    plan = plan_of(many, outputs, zero, bits, block, levels, offset, tuning, narrow)
    xs = [_reorder(many, plane, plan) for plane in plan.planes]
    operands = (*xs, *planes, scale, *(() if plan.zero == "none" else (zero,)))
    with compat.interpret_gpu() if interpret else contextlib.nullcontext():
        y = _call(plan, interpret)(*operands)
    if plan.partial:
        y = y.sum(0).T
    y = y[:rows]
    if not narrow:
        y = y.reshape(2, -1, outputs).sum(0)
    return y.astype(x.dtype).reshape(*lead, outputs)


def _terms(x):
    """x [M, K] as bfloat16; of wider dtypes the high above the low terms [2 M, K]."""
    high = x.astype(jnp.bfloat16)
    if x.dtype == jnp.bfloat16:
        return high
    wide = x.astype(jnp.float32)
    low = wide - lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high, low.astype(jnp.bfloat16)])


def _reorder(x, plane: Plane, plan: Plan):
    """x [M, K], the inputs of a step by their place in the byte, in wgmma's order.

    The plane's weight 2^low goes into x, exactly.
    """
    x = (x * jnp.asarray(2.0**plane.low, x.dtype)).astype(jnp.bfloat16)
    x = x.reshape(plan.rows, -1, plane.bytes, plane.places).swapaxes(2, 3)
    return fragments.permute(x).reshape(plan.rows, plan.inputs)


def _call(plan: Plan, interpret: bool):
    t = plan.tuning
    scratch = dict(
        out=hopper.result(t.warpgroups, t.rows, plan.partial),
        x=[
            hopper.tiles((t.stages, t.rows, t.inputs), jnp.bfloat16, 2 * plane.block)
            for plane in plan.planes
        ],
        w=[
            hopper.tiles((t.stages, plan.tile, plane.bytes), jnp.uint8, plane.bytes)
            for plane in plan.planes
        ],
        full=plgpu.Barrier(num_barriers=t.stages, num_arrivals=2 * len(plan.planes)),
        empty=plgpu.Barrier(num_barriers=t.stages, num_arrivals=t.warpgroups),
    )
    if interpret:
        scratch["staged"] = [
            plgpu.SMEM((t.warpgroups, LANES, plane.block), jnp.bfloat16)
            for plane in plan.planes
        ]
    return plgpu.kernel(
        _kernel(plan, interpret),
        out_type=hopper.result_type(t.splits, plan.rows, plan.outputs, plan.partial),
        grid=(t.splits, plan.outputs // plan.tile, plan.rows // t.rows),
        grid_names=("split", "out", "row"),
        num_threads=t.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _kernel(plan: Plan, interpret: bool):
    """The body: one warpgroup copies, the others multiply."""
    t, count = plan.tuning, len(plan.planes)

    def body(*refs, out, x, w, full, empty, staged=None):
        xs, ws = refs[:count], refs[count : 2 * count]
        scale, *zero, y = refs[2 * count :]
        ring = Ring(x, w, full, empty, staged)
        split, n, m = (lax.axis_index(name) for name in ("split", "out", "row"))
        warpgroup = lax.axis_index("warpgroup")
        first = split * plan.steps

        @pl.when(warpgroup == t.warpgroups)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _produce(plan, ring, xs, ws, (first, n * plan.tile, m * t.rows))

        @pl.when(warpgroup < t.warpgroups)
        def _():
            plgpu.set_max_registers(232 if t.warpgroups < 3 else 160, action="increase")
            row = n * plan.tile + warpgroup * LANES
            columns = _Columns(plan, scale, zero[0] if zero else None, first, row)
            total = _consume(plan, ring, columns, warpgroup)
            here, rows = pl.ds(row, LANES), pl.ds(m * t.rows, t.rows)
            hopper.store(total, out.at[warpgroup], y, split, here, rows, plan.partial)

    return body


def _produce(plan: Plan, ring: Ring, xs, ws, origin) -> None:
    """Keep the ring full: tiles of every plane and of the x that it meets."""
    t = plan.tuning
    first, n, m = origin

    @pl.loop(0, plan.steps)
    def _(i):
        at = lax.rem(i, t.stages)
        pl.when(i >= t.stages)(lambda: plgpu.barrier_wait(ring.empty.at[at]))
        for p, plane in enumerate(plan.planes):
            weights = ws[p].at[
                pl.ds(n, plan.tile), pl.ds((first + i) * plane.bytes, plane.bytes)
            ]
            inputs = xs[p].at[pl.ds(m, t.rows), pl.ds((first + i) * t.inputs, t.inputs)]
            plgpu.copy_gmem_to_smem(weights, ring.w[p].at[at], ring.full.at[at])
            plgpu.copy_gmem_to_smem(inputs, ring.x[p].at[at], ring.full.at[at])


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Scales and zero points of this warpgroup's 64 rows of W, from device memory."""

    plan: Plan
    scale: object
    zero: object
    first: object
    row: object

    def __call__(self, i) -> tuple[list, list]:
        """(scales, zeros) of the blocks of step ``i``, in float32."""
        rows, count = pl.ds(self.row, LANES), range(self.plan.groups)
        at = [self.plan.group(self.first + i, g) for g in count]
        refs = (self.scale, self.zero)
        return tuple(
            [] if ref is None else [hopper.column(ref, rows, g) for g in at]
            for ref in refs
        )


def _consume(plan: Plan, ring: Ring, columns: _Columns, warpgroup):
    """The sums [64, rows] of this warpgroup over all steps, scaled."""
    shape = (LANES, plan.tuning.rows)
    if plan.tuning.sums and plan.block is not None:
        return _sum_blocks(plan, ring, columns, warpgroup, shape)
    once = columns(0) if plan.block is None else None

    def scope(acc):
        def step(i, values):
            ahead = values
            if once is None:  # fetch the next step's scales while this one multiplies
                ahead = columns(lax.min(i + 1, plan.steps - 1))
            plgpu.barrier_wait(ring.full.at[lax.rem(i, plan.tuning.stages)])
            accs = [acc] * plan.groups
            _multiply(plan, ring, accs, i, values, warpgroup, scaled=once is None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(ring.empty.at[lax.rem(i, plan.tuning.stages)])
            return ahead

        lax.fori_loop(0, plan.steps, step, columns(0) if once is None else once)
        return acc[...]

    total = pl.run_scoped(scope, plgpu.ACC(shape))
    return total if once is None else total * hopper.across(once[0][0], shape[1])


def _sum_blocks(plan: Plan, ring: Ring, columns: _Columns, warpgroup, shape):
    """Each block is summed apart and then scaled, all in float32."""

    def step(i, carry):
        total, values = carry
        ahead = columns(lax.min(i + 1, plan.steps - 1))
        plgpu.barrier_wait(ring.full.at[lax.rem(i, plan.tuning.stages)])

        def scope(*accs):
            _multiply(plan, ring, accs, i, values, warpgroup, scaled=False)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in accs]

        sums = pl.run_scoped(scope, *[plgpu.ACC(shape)] * plan.groups)
        plgpu.barrier_arrive(ring.empty.at[lax.rem(i, plan.tuning.stages)])
        for one, scale in zip(sums, values[0], strict=True):
            total = total + one * hopper.across(scale, shape[1])
        return total, ahead

    nothing = hopper.zeros(shape[1])
    return lax.fori_loop(0, plan.steps, step, (nothing, columns(0)))[0]


def _multiply(plan: Plan, ring: Ring, accs, i, values, warpgroup, *, scaled) -> None:
    """accs[g] += W x^T of one step, plane by plane and place by place."""
    at = lax.rem(i, plan.tuning.stages)
    scales, zeros = values
    interpret = ring.staged is not None
    for p, plane in enumerate(plan.planes):
        rows = ring.w[p].at[at, pl.ds(warpgroup * LANES, LANES)]
        words = compat.load(rows, plgpu.Layout.WGMMA_UPCAST_2X)
        for j, tile in enumerate(_operands(plan, plane, words, interpret)):
            for g, acc in enumerate(accs):
                part = tile[:, g * plane.block : (g + 1) * plane.block]
                if plan.levels is None:
                    part = _centred(plan, plane, part, zeros[g] if zeros else None)
                if scaled:
                    part = part * hopper.across(
                        scales[g].astype(jnp.bfloat16), plane.block
                    )
                if interpret:  # the interpreter's wgmma wants both in shared memory
                    ring.staged[p][warpgroup] = part
                    part = ring.staged[p].at[warpgroup]
                columns = pl.ds(j * plane.bytes + g * plane.block, plane.block)
                inputs = ring.x[p].at[at, :, columns]
                plgpu.wgmma(acc, part, compat.transposed(inputs))


def _operands(plan: Plan, plane: Plane, words, interpret: bool):
    """The tile of W [64, bytes] for each place in the byte."""
    if plan.levels is not None:
        yield from fragments.lookup(words, plan.levels, interpret=interpret)
        return
    for j in range(plane.places):
        yield fragments.digits(words, plane.part, j, interpret=interpret)


def _centred(plan: Plan, plane: Plane, tile, zero):
    """Digits less the zero point, exact for whole ones; the lowest plane carries it."""
    base = -128.0 if plane.part == 8 else 128.0
    if plane.low:
        return tile - _constant(base)
    if plan.zero == "none":
        both = base + plan.middle
        if _constant(both) == both:
            return tile if both == 0 else tile - _constant(both)
        return (tile - _constant(base)) - _constant(plan.middle)
    if plan.zero == "integer":
        return tile - hopper.across((zero + base).astype(jnp.bfloat16), plane.block)
    return (tile - _constant(base)) - hopper.across(
        zero.astype(jnp.bfloat16), plane.block
    )


def _constant(value: float):
    """A bfloat16 known while tracing."""
    return np.asarray(value, jnp.bfloat16)
