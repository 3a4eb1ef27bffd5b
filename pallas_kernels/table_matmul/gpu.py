"""Hopper: each row's table waits in the registers of the threads that hold its codes.

A thread holds codes of two rows of W, hence two tables of up to 16 bfloat16: 16
registers. Byte permutations look four codes up at once (``fragments``), and the entries
are wgmma's operand as they are, for a table has its scale within. Of codes of three
bits the lowest, a plane of its own, is put below the others first.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_ring
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_ring import Place, Product, Ring
from pallas_kernels.quantized_matmul import fragments
from pallas_kernels.quantized_matmul.gpu_plan import (
    Plan,
    Tuning,
    default_tuning,
    plan_of,
    refuse,
    tuned,
)
from pallas_kernels.table_matmul.reference import check

__all__ = ["Tuning", "default_tuning", "table_matmul"]

MOST_BITS = 4


def table_matmul(
    x,
    planes,
    table,
    *,
    bits: int,
    block: int | None,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.table_matmul`` on Hopper's tensor cores, for codes of 1 to 4 bits.

    Sums are float32. x and tables are multiplied in bfloat16: where x is wider, both
    as two terms, high and low, in one pass over the codes. NotImplementedError as in
    ``quantized_matmul``: blocks that are no multiple of 16 bytes of each plane, rows of
    planes that are not aligned to 16 bytes, or outputs to 64.
    """
    hopper.require(interpret)
    check(x, planes, table, bits, block)
    inputs, outputs = x.shape[-1], len(planes[0])
    narrow = x.dtype == jnp.bfloat16
    if not x.size:
        return jnp.zeros((*x.shape[:-1], outputs), x.dtype)
    if bits > MOST_BITS:
        raise NotImplementedError(
            f"tables of {bits}-bit codes; registers hold those of {MOST_BITS} at most"
        )
    refuse(inputs, outputs, bits, block, None, planes)
    terms = hopper.terms(x)
    if tuning is None:
        shape = (len(terms), inputs, outputs, bits, block or inputs)
        tuning = tuned("table_matmul", shape, narrow, interpret)
    many = jnp.pad(terms, ((0, -len(terms) % tuning.rows), (0, 0)))
    plan = plan_of(many, outputs, None, bits, block, None, None, tuning, narrow)
    product = Product(
        plan,
        [plan.stream(many, plan.planes[0])],
        [plane.stream(codes) for codes, plane in zip(planes, plan.planes, strict=True)],
        _words(table, bits, narrow),
        functools.partial(_consume, plan, 2**bits // 2),
        [plan.planes[0].block],
    )
    return hopper.joined(product.run(interpret), x, outputs)


def _words(table, bits: int, narrow: bool) -> list:
    """Tables [out, blocks * entries / 2] of two bfloat16 in a uint32, for each term."""
    short = 2**bits - table.shape[2]
    filled = jnp.pad(table, ((0, 0), (0, 0), (0, short))) if short else table
    parts = [filled] if narrow else [filled, hopper.rest(filled)]
    pairs = (len(table), -1, 2)
    return [
        lax.bitcast_convert_type(part.astype(jnp.bfloat16).reshape(pairs), jnp.uint32)
        for part in parts
    ]


def _consume(plan: Plan, pairs: int, ring: Ring, tables, place: Place):
    """The sums [64, rows] of this warpgroup over all steps."""
    rows = pl.ds(place.row, LANES)

    def fetch(i):
        """The tables of each group of step ``i``, ``pairs`` columns a term."""
        at = [plan.group(place.first + i, g) * pairs for g in range(plan.groups)]
        column = functools.partial(hopper.column, dtype=jnp.uint32)
        return [
            [[column(ref, rows, first + p) for p in range(pairs)] for ref in tables]
            for first in at
        ]

    multiply = functools.partial(_multiply, plan, ring, place)
    constant = plan.block is None
    return hopper_ring.sums(plan, ring, fetch, multiply, constant=constant)


def _multiply(plan: Plan, ring: Ring, place: Place, accs, at, tables) -> None:
    """accs[g] += W x^T of one step, place by place."""
    widest, interpret = plan.planes[0], ring.staged is not None
    here = pl.ds(place.warpgroup * LANES, LANES)
    words, *below = (
        fragments.load(ring.w[p].at[at, here], plane.part, widest.part)
        for p, plane in enumerate(plan.planes)
    )
    for g, acc in enumerate(accs):
        size = widest.block
        own = words[:, g * size : (g + 1) * size]
        low = below[0][:, g * size // 2 : (g + 1) * size // 2] if below else None
        for table in tables[g]:
            found = fragments.entries(own, low, table, widest.part, interpret=interpret)
            for j, part in enumerate(found):
                columns = pl.ds(j * widest.bytes + g * size, size)
                inputs = ring.x[0].at[at, :, columns]
                part = hopper_ring.operand(ring, 0, place, part)
                plgpu.wgmma(acc, part, compat.transposed(inputs))
