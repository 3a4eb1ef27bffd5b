"""Many rows: codes times scale go to a bfloat16 tile, products with all rows follow.

The tile is made once for up to ``Tuning.rows`` rows of x, and multiplied ``CHUNK`` rows
at a time in a loop of one long stretch of code. Each product is one matrix unit wide
and deep and adds to sums in VMEM, so that the compiler has nothing to spill.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import NN, NT, TN, halves
from pallas_kernels.quantized_matmul.tpu_planes import Plan, Reading

WIDE = 256  # of the newer matrix units, twice that of the older ones
GROUP = 128  # outputs whose scale is spread at a time: whole lanes of it


def dot(a, b, dimensions=NN):
    """A float32 sum over products of operands as they are."""
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def words(plane_ref, outputs: slice, start: int, lanes: int):
    """A piece of the stored bytes, four outputs to an int32 word."""
    return pltpu.bitcast(plane_ref[outputs, start : start + lanes], jnp.int32)


def fill(tile_ref, plane_ref, scale, *, plan: Plan, reading: Reading, step, kind):
    """The tile [outputs, inputs] of codes times scale, multiplied as ``kind``."""
    (outputs, count), lanes = plane_ref.shape, plan.lanes(reading)
    for first in range(0, outputs, GROUP):
        here = slice(first, min(first + GROUP, outputs))
        for start in range(0, count, lanes):
            inside = _inside(plan, reading, step * count + start, lanes)
            factor = sum(dot(part, inside, TN) for part in halves(scale[:, here]))
            piece = words(plane_ref, here, start, lanes)
            for phase in range(reading.phases):
                value = reading.read(piece, phase).astype(kind) * factor.astype(kind)
                to = start * reading.phases + phase * lanes
                tile_ref[here, to : to + lanes] = value.astype(tile_ref.dtype)


def _inside(plan: Plan, reading: Reading, start, count: int):
    """Spreads scales: where a block [blocks, bytes] has a byte, the power of two that
    ``read`` leaves to be multiplied, zero elsewhere.
    """
    shape = (plan.blocks, count)
    byte = start + lax.broadcasted_iota(jnp.int32, shape, 1)
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    here = byte // plan.span(reading) == block
    return jnp.where(here, reading.multiplier, 0.0).astype(jnp.bfloat16)


def multiply(x_ref, tile_ref, acc_ref, fresh, chunk: int):
    """acc += x tile^T, or acc = x tile^T where ``fresh``."""
    outputs, inputs = tile_ref.shape

    def add(rows):
        for n in slices(outputs):
            old = jnp.where(fresh, 0.0, acc_ref[rows, n])
            for k in slices(inputs):
                acc_ref[rows, n] = old + dot(x_ref[rows, k], tile_ref[n, k], NT)
                old = acc_ref[rows, n]

    by_rows(add, len(x_ref), chunk)


def slices(count: int) -> list[slice]:
    """One for each matrix unit's width of ``count`` columns."""
    return [slice(i, min(i + WIDE, count)) for i in range(0, count, WIDE)]


def by_rows(act: Callable, count: int, chunk: int):
    """``act`` on every ``chunk`` of ``count`` rows, and on what is left."""
    whole, left = divmod(count, chunk)
    if whole == 1:  # no loop: what stands before may be overlapped with it
        act(slice(0, chunk))
    elif whole:

        def body(i, _):
            act(pl.ds(pl.multiple_of(i * chunk, chunk), chunk))

        lax.fori_loop(0, whole, body, None)
    if left:
        act(slice(whole * chunk, count))
