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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels import tuning as tables
from pallas_kernels.quantized_matmul import fragments
from pallas_kernels.quantized_matmul.reference import parts

LANES = 64  # rows of W of one warpgroup: wgmma's fixed size
SHARED = 227 * 1024  # bytes of shared memory that one block may use
PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tiles: rows of x, inputs of a step, depth of the ring, splits of the inputs.

    ``splits`` blocks share an output tile; their float32 parts are summed outside,
    where XLA fuses the sum with what follows. ``sums``: scales multiply each block's
    sums in float32 (few rows), else the weights in bfloat16 (many rows).
    """

    rows: int
    inputs: int
    stages: int = 4
    splits: int = 1
    warpgroups: int = 2
    sums: bool = True


class Plane(NamedTuple):
    """One plane of codes: bits, place of its lowest bit, bytes per step and block."""

    part: int
    low: int
    bytes: int
    block: int

    @property
    def places(self) -> int:
        return 8 // self.part


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about one call."""

    rows: int
    inputs: int
    outputs: int
    block: int | None
    planes: tuple[Plane, ...]
    zero: str  # "none" (``middle`` instead), "integer" or "float"
    middle: float
    levels: tuple[float, ...] | None
    narrow: bool  # the result is bfloat16
    tuning: Tuning

    @property
    def steps(self) -> int:
        return self.inputs // self.tuning.inputs // self.tuning.splits

    @property
    def groups(self) -> int:
        """Blocks of scales in a step (one where a block spans steps)."""
        return 1 if self.block is None else max(1, self.tuning.inputs // self.block)

    @property
    def tile(self) -> int:
        return LANES * self.tuning.warpgroups

    @property
    def partial(self) -> bool:
        """The kernel writes float32 out^T for each split."""
        return self.tuning.splits > 1 or not self.narrow

    def group(self, step, g: int):
        """The block of scales that group ``g`` of a step belongs to."""
        if self.block is None:
            return 0
        if self.block > self.tuning.inputs:
            return step // (self.block // self.tuning.inputs)
        return step * self.groups + g


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

    x is multiplied in bfloat16, sums are float32; tables (4 bits) are rounded to
    bfloat16. NotImplementedError where a block of inputs is no multiple of 16 bytes of
    each plane, rows of planes are not aligned to 16 bytes, or outputs to 64.
    """
    compat.require_hopper(interpret)
    if interpret and compat.VERSION < (0, 11):
        raise NotImplementedError("jax 0.10's interpreter cannot load single columns")
    lead, inputs = x.shape[:-1], x.shape[-1]
    rows, outputs = max(1, x.size // inputs), len(planes[0])
    _refuse(inputs, outputs, bits, block, levels, planes)
    if tuning is None:
        shape = (rows, inputs, outputs, bits, block or inputs)
        found = None if interpret else tables.look_up("quantized_matmul", shape)
        tuning = Tuning(**found) if found else default_tuning(*shape)
    many = jnp.pad(x.reshape(-1, inputs), ((0, -rows % tuning.rows), (0, 0)))
    plan = _plan(many, outputs, zero, bits, block, levels, offset, tuning)
    xs = [_reorder(many, plane, plan) for plane in plan.planes]
    operands = (*xs, *planes, scale, *(() if plan.zero == "none" else (zero,)))
    with compat.interpret_gpu() if interpret else contextlib.nullcontext():
        y = _call(plan, interpret)(*operands)
    if plan.partial:
        y = y.sum(0).T
    return y[:rows].astype(x.dtype).reshape(*lead, outputs)


def _refuse(inputs, outputs, bits, block, levels, planes) -> None:
    if levels is not None and (bits != 4 or len(levels) > 16):
        raise NotImplementedError(f"a table of {bits}-bit codes; only 4 bits have one")
    if outputs % LANES:
        raise NotImplementedError(f"{outputs} outputs; wgmma needs a multiple of 64")
    for part, plane in zip(parts(bits), planes, strict=True):
        row, group = plane.shape[1], (block or inputs) * part / 8
        if row % 16 or row * 8 != inputs * part:
            raise NotImplementedError(
                f"rows of {row} bytes ({inputs} inputs); the copy engine needs 16n"
            )
        if block is not None and (group % fragments.TILE or inputs % block):
            raise NotImplementedError(
                f"blocks of {block} of {inputs} inputs are {group:g} bytes of the "
                f"{part}-bit plane; wgmma needs whole blocks of 16n bytes"
            )


def default_tuning(rows, inputs, outputs, bits, block) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many."""
    tile = next((r for r in (8, 16, 32, 64, 128) if rows <= r), 128)
    warpgroups = 2 if outputs % (2 * LANES) == 0 else 1
    step = next(
        (s for s in (512, 256, 128, 64, 32) if _fits(s, inputs, bits, block)), 0
    )
    if not step:
        raise NotImplementedError(
            f"no step of 32 to 64 bytes divides {inputs} inputs into whole blocks of "
            f"{block} at {bits} bits"
        )
    copies = len(parts(bits))
    stage = copies * 2 * tile * step + LANES * warpgroups * step * bits // 8
    out = 4 * LANES * warpgroups * tile
    stages = min(8 if tile <= 32 else 4, (SHARED - 4096 - out) // stage)
    tiles = -(-rows // tile) * outputs // (LANES * warpgroups)
    steps = inputs // step
    splits = [s for s in (1, 2, 4, 8) if steps % s == 0 and steps // s >= 4] or [1]
    enough = next((s for s in splits if tiles * s >= 2 * PROCESSORS), splits[-1])
    stages = max(1, min(stages, steps // enough))
    return Tuning(tile, step, stages, enough, warpgroups, sums=tile <= 32)


def _fits(step: int, inputs: int, bits: int, block: int) -> bool:
    """A step holds whole blocks, or a block whole steps; 32 to 64 bytes of a plane."""
    low, high = min(parts(bits)) * step // 8, max(parts(bits)) * step // 8
    return (
        inputs % step == 0
        and (step % block == 0 or block % step == 0)
        and low >= 32
        and high <= (128 if bits == 8 else 64)
    )


def _plan(x, outputs, zero, bits, block, levels, offset, tuning) -> Plan:
    planes, low = [], 0
    for part in reversed(parts(bits)):
        size = tuning.inputs * part // 8
        planes.append(
            Plane(part, low, size, min(size, (block or x.shape[1]) * part // 8))
        )
        low += part
    kind = "none"
    if zero is not None and levels is None:
        whole = jnp.issubdtype(zero.dtype, jnp.integer)
        kind = "integer" if whole else "float"
    return Plan(
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=outputs,
        block=None if block == x.shape[1] else block,
        planes=tuple(reversed(planes)),
        zero=kind,
        middle=float(2 ** (bits - 1) if offset is None else offset),
        levels=levels,
        narrow=x.dtype == jnp.bfloat16,
        tuning=tuning,
    )


def _reorder(x, plane: Plane, plan: Plan):
    """x [M, K], the inputs of a step by their place in the byte, in wgmma's order.

    The plane's weight 2^low goes into x, exactly.
    """
    x = (x * jnp.asarray(2.0**plane.low, x.dtype)).astype(jnp.bfloat16)
    x = x.reshape(plan.rows, -1, plane.bytes, plane.places).swapaxes(2, 3)
    return fragments.permute(x).reshape(plan.rows, plan.inputs)


def _call(plan: Plan, interpret: bool):
    t = plan.tuning
    if plan.partial:
        shape, kind = (t.splits, plan.outputs, plan.rows), jnp.float32
        out = plgpu.SMEM((t.warpgroups, LANES, t.rows), jnp.float32)
    else:
        shape, kind = (plan.rows, plan.outputs), jnp.bfloat16
        swizzle = (plgpu.SwizzleTransform(128),)
        out = plgpu.SMEM((t.warpgroups, t.rows, LANES), kind, transforms=swizzle)
    scratch = dict(
        out=out,
        x=[
            _tiles((t.stages, t.rows, t.inputs), jnp.bfloat16, 2 * plane.block)
            for plane in plan.planes
        ],
        w=[
            _tiles((t.stages, plan.tile, plane.bytes), jnp.uint8, plane.bytes)
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
        out_type=jax.ShapeDtypeStruct(shape, kind),
        grid=(t.splits, plan.outputs // plan.tile, plan.rows // t.rows),
        grid_names=("split", "out", "row"),
        num_threads=t.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _tiles(shape, dtype, width: int):
    """Shared memory, swizzled in rows of ``width`` bytes (at most 128)."""
    width = min(128, width & -width)
    wide = width // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, wide))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))


def _kernel(plan: Plan, interpret: bool):
    """The body: one warpgroup copies, the others multiply."""
    t, count = plan.tuning, len(plan.planes)

    def body(*refs, out, x, w, full, empty, staged=None):
        xs, ws, (scale, *zero, y) = (
            refs[:count],
            refs[count : 2 * count],
            refs[2 * count :],
        )
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
            mine = out.at[warpgroup]
            if plan.partial:
                mine[...] = total
                target = y.at[split, here, rows]
            else:
                layout = plgpu.Layout.WGMMA_TRANSPOSED
                turned = plgpu.layout_cast(total.astype(jnp.bfloat16), layout)
                compat.transposed(mine)[...] = turned
                target = y.at[rows, here]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, target)
            plgpu.wait_smem_to_gmem(0)

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
        groups = range(self.plan.groups)
        scales = [self._load(self.scale, i, g) for g in groups]
        zeros = (
            [self._load(self.zero, i, g) for g in groups]
            if self.zero is not None
            else []
        )
        return scales, zeros

    def _load(self, ref, i, g):
        here = ref.at[pl.ds(self.row, LANES), self.plan.group(self.first + i, g)]
        layout = plgpu.Layout.WGMMA.reduce(1)
        return compat.load(here, layout, optimized=False).astype(jnp.float32)


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
    return total if once is None else total * _across(once[0][0], shape[1])


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
            total = total + one * _across(scale, shape[1])
        return total, ahead

    nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
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
                    part = part * _across(scales[g].astype(jnp.bfloat16), plane.block)
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
        return tile - _across((zero + base).astype(jnp.bfloat16), plane.block)
    return (tile - _constant(base)) - _across(zero.astype(jnp.bfloat16), plane.block)


def _constant(value: float):
    """A bfloat16 known while tracing."""
    return np.asarray(value, jnp.bfloat16)


def _across(column, width: int):
    """One value per row of W, over ``width`` columns."""
    return lax.broadcast_in_dim(column, (LANES, width), [0])
