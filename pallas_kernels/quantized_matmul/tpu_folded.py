"""Many rows: codes times scale go to a bfloat16 tile, products with all rows follow.

The tile is made once for up to ``Tuning.rows`` rows of x, and multiplied some rows at
a time in a loop of one long stretch of code (``mxu.multiply``).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import TN, product_of_terms, put
from pallas_kernels.quantized_matmul.tpu_planes import Plan, Reading

GROUP = 128  # outputs whose scale is spread at a time: whole lanes of it


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
            factor = product_of_terms(scale[:, here], inside, TN)
            piece = words(plane_ref, here, start, lanes)
            for phase in range(reading.phases):
                value = reading.read(piece, phase).astype(kind) * factor.astype(kind)
                to = start * reading.phases + phase * lanes
                put(tile_ref, here, slice(to, to + lanes), value)


def _inside(plan: Plan, reading: Reading, start, count: int):
    """Spreads scales: where a block [blocks, bytes] has a byte, the power of two that
    ``read`` leaves to be multiplied, zero elsewhere.
    """
    shape = (plan.blocks, count)
    byte = start + lax.broadcasted_iota(jnp.int32, shape, 1)
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    here = byte // plan.span(reading) == block
    return jnp.where(here, reading.multiplier, 0.0).astype(jnp.bfloat16)
