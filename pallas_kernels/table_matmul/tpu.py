"""TPU: a gather within the lanes looks codes up; 128 lanes hold several tables.

The codes of one phase of 128 bytes belong to the blocks of those bytes, whose tables
lie side by side: lane = base + (block among these bytes) entries + code, where the
base is known while tracing. Codes meet x in their own order (see ``tpu_inputs``).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import NT, dot, ones_where
from pallas_kernels.quantized_matmul.reference import parts
from pallas_kernels.quantized_matmul.tpu_inputs import in_order
from pallas_kernels.quantized_matmul.tpu_planes import (
    FEW,
    LANES,
    Plan,
    Reading,
)
from pallas_kernels.table_matmul.reference import check

SUBLANES = 32


def table_matmul(
    x, planes, table, *, bits: int, block: int | None, interpret: bool = False
):
    """``reference.table_matmul`` for codes of 1, 2 or 4 bits in whole lanes."""
    check(x, planes, table, bits, block)
    lead, inputs = x.shape[:-1], x.shape[-1]
    rows, outputs = x.reshape(-1, inputs), len(planes[0])
    if len(parts(bits)) > 1 or bits == 8:
        raise NotImplementedError(
            f"tables of {bits}-bit codes; this kernel has 1, 2 and 4: those of two "
            "planes lie in different lanes, 256 entries in more than 128"
        )
    if outputs % SUBLANES or not len(rows):
        raise NotImplementedError(
            f"{len(rows)} rows, {outputs} outputs: accepted are at least one row and "
            f"a multiple of {SUBLANES} outputs"
        )
    reading = Reading(bits, signed=False)
    plan = Plan(inputs, block or inputs, (reading,))
    step = plan.tile(4096 if len(rows) <= FEW else 1024)
    if reason := _refusal(plan, reading, step):
        raise NotImplementedError(reason)
    bm, bn = min(-(-len(rows) // 16) * 16, 256), min(outputs, 512)
    padded = jnp.pad(rows, ((0, -len(rows) % bm), (0, 0)))
    ordered = in_order(padded, plan, reading, interpret)
    tables, at = _by_step(table, plan, reading, step)
    y = pl.pallas_call(
        functools.partial(_kernel, plan=plan, reading=reading),
        out_shape=jax.ShapeDtypeStruct((len(padded), outputs), x.dtype),
        grid=(len(padded) // bm, pl.cdiv(outputs, bn), inputs // step),
        in_specs=[
            pl.BlockSpec((bm, step), lambda m, n, k: (m, k)),
            pl.BlockSpec((bn, step // reading.phases), lambda m, n, k: (n, k)),
            pl.BlockSpec((1, bn, tables.shape[2]), lambda m, n, k: (at(k), n, 0)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="table_matmul",
    )(ordered, planes[0], tables)
    return y[: len(rows)].reshape(*lead, outputs)


def _refusal(plan: Plan, reading: Reading, step: int) -> str | None:
    entries = plan.slots(reading) << reading.part
    if entries > LANES:
        return (
            f"blocks of {plan.block} need {entries} entries for {plan.lanes(reading)} "
            f"bytes; {LANES} lanes hold them"
        )
    if plan.blocks > 1 and step % plan.block:
        return f"steps of {step} inputs are no whole blocks of {plan.block}"
    return None


def _by_step(table, plan: Plan, reading: Reading, step: int):
    """Tables [steps, out, entries of a step], filled to 2^bits, and which is when."""
    outputs, blocks, entries = table.shape
    filled = jnp.pad(table, ((0, 0), (0, 0), (0, 2**reading.part - entries)))
    steps = 1 if blocks == 1 else plan.inputs // step
    ordered = jnp.swapaxes(filled.reshape(outputs, steps, -1), 0, 1)
    return ordered, (lambda k: k) if steps > 1 else (lambda k: 0)


def _kernel(x_ref, plane_ref, table_ref, y_ref, sum_ref, *, plan, reading):
    """Add the products of one step, 128 bytes of each output after the other."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    lanes = plan.lanes(reading)
    for start in range(0, plane_ref.shape[1], lanes):
        table, base = _tables(table_ref, plan, reading, start)
        words = pltpu.bitcast(plane_ref[:, start : start + lanes], jnp.int32)
        for phase in range(reading.phases):
            index = reading.read(words, phase).astype(jnp.int32) + base
            w = jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds")
            at = start * reading.phases + phase * lanes
            x = x_ref[:, at : at + lanes]
            sum_ref[...] += dot(x, w.astype(x.dtype), NT)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _tables(table_ref, plan: Plan, reading: Reading, start: int):
    """128 lanes with the tables of the bytes from ``start`` on; where theirs begin."""
    lanes, entries = plan.lanes(reading), 2**reading.part
    first = start // plan.span(reading) * entries if plan.blocks > 1 else 0
    chunk = first - first % LANES
    table = table_ref[0, :, chunk : min(chunk + LANES, table_ref.shape[2])]
    slot = lax.broadcasted_iota(jnp.int32, (1, lanes), 1) // plan.slot(reading)
    return _filled(table, lanes), first % LANES + slot * entries


def _filled(table, lanes: int):
    """As many lanes as codes, float32, by an exact product with a slice of 1."""
    width = table.shape[1]
    if width == lanes:
        return table.astype(jnp.float32)
    place = lax.broadcasted_iota(jnp.int32, (width, lanes), 1)
    same = place == lax.broadcasted_iota(jnp.int32, (width, lanes), 0)
    return dot(table, ones_where(same, table.dtype))
