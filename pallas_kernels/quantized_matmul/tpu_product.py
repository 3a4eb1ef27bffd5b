"""The TPU kernel behind every packed product: y = sum over planes of x W_plane.

Two bodies share everything but the place of the scale:

* ``tpu_folded`` (many rows): codes times scale go to a bfloat16 tile, products follow.
  The scale of each block is spread over the lanes by a product with 0/1.
* ``split`` (few rows): row b M + m of the left operand is row m of x where block b is,
  zero elsewhere; the product then keeps blocks apart, and the scale multiplies a few
  rows of float32 partial sums instead of the whole weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mxu
from pallas_kernels.mxu import NN, NT, bf16_arithmetic, by_rows, slices, terms
from pallas_kernels.quantized_matmul.tpu_folded import fill, words
from pallas_kernels.quantized_matmul.tpu_inputs import activations, block_sums
from pallas_kernels.quantized_matmul.tpu_planes import Groups, Plan, Reading, Tuning

SUBLANES = 32  # of bytes
VMEM = 48 * 2**20
FINISHED = 256  # rows of y written between two turns of a loop


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
    return sum(mxu.product(chosen, h) for h in terms(scale)) * reading.multiplier


def _split(x, plane_ref, scale, acc_ref, *, plan, reading, group, step):
    """acc[b M + m] += scale_b (x_m where block b is) codes^T, group by group."""
    lanes, count, height = plan.lanes(reading), plane_ref.shape[1], x.shape[0]
    factors = _scale_rows(scale, plan, reading, group, height, (step * count, count))
    total = jnp.zeros(acc_ref.shape, jnp.float32)
    for index, first in enumerate(range(0, count, group * lanes)):
        sums = jnp.zeros(acc_ref.shape, jnp.float32)
        for start in range(first, first + group * lanes, lanes):
            piece = words(plane_ref, slice(None), start, lanes)
            for phase in range(reading.phases):
                codes = reading.read(piece, phase).astype(x.dtype)
                at = start * reading.phases + phase * lanes
                sums += mxu.product(x[:, at : at + lanes], codes, NT)
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


def _thrice(offsets):
    """What multiplies ``_sums`` so that float32 keeps all but its last bits."""
    high, low = terms(offsets)
    return jnp.concatenate((high, high, low))


def _sums(x, plan: Plan):
    """Sums of x over blocks [rows, 3 blocks] as bfloat16 terms: high, low, high."""
    high, low = terms(block_sums(x, plan))
    return jnp.concatenate((high, low, high), 1)


def _body(*refs, plan: Plan, tuning: Tuning, groups, counts, shift, kind):
    """One step of the grid (rows, outputs, inputs)."""
    it = iter(refs)
    x, planes, scales, extra, sums, low_rank = (
        [next(it) for _ in range(count)] for count in counts
    )
    out_ref, *scratch = it
    step = pl.program_id(2)
    accumulators = scratch if tuning.split else scratch[:1]
    if tuning.split:

        @pl.when(step == 0)
        def _():
            for acc_ref in accumulators:
                acc_ref[...] = jnp.zeros_like(acc_ref)

    for i, reading in enumerate(plan.readings):
        scale = scales[i % len(scales)][...]
        own_x = x[plan.parts.index(reading.part)]
        same = {"plan": plan, "reading": reading, "step": step}
        if tuning.split:
            group = groups.pieces[i]
            _split(own_x[...], planes[i], scale, accumulators[i], group=group, **same)
        else:
            acc_ref, tile_ref = scratch
            fill(tile_ref, planes[i], scale, kind=kind, **same)
            fresh = (step == 0) if i == 0 else False
            mxu.multiply(own_x, tile_ref, acc_ref, fresh, tuning.chunk)

    def finish(rows):
        for here in slices(out_ref.shape[1]):
            if tuning.split:
                y = sum(_fold_rows(acc[:, here], tuning.rows) for acc in accumulators)
            else:
                y = accumulators[0][rows, here]
            if sums:
                offsets = shift(*(ref[:, here] for ref in (*scales, *extra)))
                terms = _thrice(offsets.astype(jnp.float32))
                for k in slices(len(terms)):
                    y += mxu.product(sums[0][rows, k], terms[k])
            if low_rank:
                y += mxu.product(low_rank[0][rows, :], low_rank[1][:, here])
            out_ref[rows, here] = y.astype(out_ref.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        by_rows(finish, tuning.rows, FINISHED)


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
    tuning = tuning or plan.tuning(len(rows), outputs, x.dtype.itemsize)
    # Narrow arrays lie on a TPU with the long axis minor: transposing moves nothing.
    scales, extra = (tuple(a.T for a in group) for group in (scales, extra))
    y = _call(rows, planes, scales, extra, shift, low_rank, plan, tuning, interpret)
    return y[: len(rows)].reshape(*x.shape[:-1], outputs)


def _multiplied_as(dtype, scales: tuple, plan: Plan):
    """bfloat16 where codes times scales are then rounded once, else float32."""
    kinds = (dtype, *(scale.dtype for scale in scales))
    looked_up = any(reading.levels for reading in plan.readings)
    narrow = all(kind == jnp.bfloat16 for kind in kinds) and not looked_up
    return jnp.bfloat16 if narrow and bf16_arithmetic() else jnp.float32


def _call(x, planes, scales, extra, shift, low_rank, plan, tuning, interpret):
    """Order the activations, then one kernel over (rows, outputs, inputs)."""
    outputs, dtype = planes[0].shape[0], x.dtype
    groups = None
    if tuning.split:
        groups = Groups.of(plan, len(x), tuning.inputs)
        x = jnp.pad(x, ((0, groups.rows - len(x)), (0, 0)))
        tuning = dataclasses.replace(tuning, rows=groups.rows)
    ordered = activations(x, plan, groups, interpret)
    sums = () if shift is None else (_sums(x, plan),)
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
        scratch = [pltpu.VMEM((bm, bn), jnp.float32), mxu.room(bn, bk, dtype)]
    operands = [ordered, planes, scales, extra, sums, low]
    return pl.pallas_call(
        functools.partial(
            _body,
            plan=plan,
            tuning=tuning,
            groups=groups,
            counts=tuple(map(len, operands)),
            shift=shift,
            kind=_multiplied_as(dtype, scales, plan),
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
