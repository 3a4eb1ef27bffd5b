"""TPU: a gather within the lanes looks codes up; 128 lanes hold several tables.

The codes of one phase of 128 bytes belong to the blocks of those bytes, whose tables
lie side by side: lane = base + (block among these bytes) entries + code, where the
base is known while tracing. Codes meet x in their own order (see ``tpu_inputs``). Of
codes in two planes (3 and 6 bits) the low parts lie in half as many lanes; a product
with a 0/1 matrix, which is exact, carries their bytes below those of the high parts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import NT, dot, ones_where
from pallas_kernels.planes import parts
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
    """``reference.table_matmul`` for codes of 1 to 4 and of 6 bits in whole lanes."""
    check(x, planes, table, bits, block)
    lead, inputs = x.shape[:-1], x.shape[-1]
    rows, outputs = x.reshape(-1, inputs), len(planes[0])
    if bits in (5, 7, 8):
        raise NotImplementedError(
            f"tables of {bits}-bit codes; this kernel has 1 to 4 and 6: 128 lanes hold "
            "no 256 entries, and planes differ by a factor of two in their bytes"
        )
    if outputs % SUBLANES or not len(rows):
        raise NotImplementedError(
            f"{len(rows)} rows, {outputs} outputs: accepted are at least one row and "
            f"a multiple of {SUBLANES} outputs"
        )
    reading = Reading(parts(bits)[0], signed=False)
    plan = Plan(inputs, block or inputs, (reading,))
    step = _step(plan, reading, bits, 4096 if len(rows) <= FEW else 1024)
    if reason := _refusal(plan, reading, bits, step):
        raise NotImplementedError(reason)
    bm, bn = min(-(-len(rows) // 16) * 16, 256), min(outputs, 512)
    padded = jnp.pad(rows, ((0, -len(rows) % bm), (0, 0)))
    ordered = in_order(padded, plan, reading, interpret)
    tables, at = _by_step(table, plan, bits, step)
    y = pl.pallas_call(
        functools.partial(_kernel, plan=plan, reading=reading, bits=bits),
        out_shape=jax.ShapeDtypeStruct((len(padded), outputs), x.dtype),
        grid=(len(padded) // bm, pl.cdiv(outputs, bn), inputs // step),
        in_specs=[
            pl.BlockSpec((bm, step), lambda m, n, k: (m, k)),
            [
                pl.BlockSpec((bn, step * part // 8), lambda m, n, k: (n, k))
                for part in parts(bits)
            ],
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
    )(ordered, list(planes), tables)
    return y[: len(rows)].reshape(*lead, outputs)


def _step(plan: Plan, reading: Reading, bits: int, wanted: int) -> int:
    """The most inputs up to ``wanted`` that divide all and are whole lanes of bytes."""
    unit, low = plan.lanes(reading) * reading.phases, parts(bits)[-1]
    pieces = plan.inputs // unit
    fits = [
        n * unit
        for n in range(1, pieces + 1)
        if pieces % n == 0 and (n == pieces or n * unit * low // 8 % LANES == 0)
    ]
    return max((n for n in fits if n <= wanted), default=fits[0])


def _refusal(plan: Plan, reading: Reading, bits: int, step: int) -> str | None:
    entries = plan.slots(reading) << bits
    if entries > LANES:
        return (
            f"blocks of {plan.block} need {entries} entries for {plan.lanes(reading)} "
            f"bytes; {LANES} lanes hold them"
        )
    if plan.blocks > 1 and step % plan.block:
        return f"steps of {step} inputs are no whole blocks of {plan.block}"
    return None


def _by_step(table, plan: Plan, bits: int, step: int):
    """Tables [steps, out, entries of a step], filled to 2^bits, and which is when."""
    outputs, blocks, entries = table.shape
    filled = jnp.pad(table, ((0, 0), (0, 0), (0, 2**bits - entries)))
    steps = 1 if blocks == 1 else plan.inputs // step
    ordered = jnp.swapaxes(filled.reshape(outputs, steps, -1), 0, 1)
    return ordered, (lambda k: k) if steps > 1 else (lambda k: 0)


def _kernel(x_ref, planes, table_ref, y_ref, sum_ref, *, plan, reading, bits):
    """Add the products of one step, 128 bytes of each output after the other."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    lanes = plan.lanes(reading)
    for start in range(0, planes[0].shape[1], lanes):
        table, base = _tables(table_ref, plan, reading, bits, start)
        words = pltpu.bitcast(planes[0][:, start : start + lanes], jnp.int32)
        below = [_carried(plane, start // 2, lanes) for plane in planes[1:]]
        for phase in range(reading.phases):
            index = reading.read(words, phase).astype(jnp.int32)
            for low in below:
                index = _with_low(index, low, phase, reading)
            index = index + base
            w = jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds")
            at = start * reading.phases + phase * lanes
            x = x_ref[:, at : at + lanes]
            sum_ref[...] += dot(x, w.astype(x.dtype), NT)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _tables(table_ref, plan: Plan, reading: Reading, bits: int, start: int):
    """128 lanes with the tables of the bytes from ``start`` on; where theirs begin."""
    lanes, entries = plan.lanes(reading), 2**bits
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


def _carried(plane_ref, start: int, lanes: int):
    """Byte start + j // 2 of each output in lane j, int32."""
    first = start - start % LANES
    chunk = plane_ref[:, first : min(first + LANES, plane_ref.shape[1])]
    shape = (chunk.shape[1], lanes)
    source = start - first + lax.broadcasted_iota(jnp.int32, shape, 1) // 2
    moves = ones_where(
        source == lax.broadcasted_iota(jnp.int32, shape, 0), jnp.bfloat16
    )
    whole = chunk.astype(jnp.int32).astype(jnp.bfloat16)  # up to 255: exact
    return dot(whole, moves).astype(jnp.int32)


def _with_low(high, low, phase: int, reading: Reading):
    """Codes whose low part, half as wide, is at its place in a byte of ``low``."""
    part = reading.part // 2
    odd = lax.broadcasted_iota(jnp.int32, (1, high.shape[1]), 1) % 2
    shift = part * (odd * reading.phases + phase)
    return (high << part) | ((low >> shift) & (2**part - 1))
