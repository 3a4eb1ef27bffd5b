"""The activations in the order of packed codes, and their sums over blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.quantized_matmul.tpu_planes import FEW, Groups, Plan, Reading


def interleaved(x, phases: int, lanes: int):
    """x with its inputs in the order of the codes: piece, phase, byte."""
    rows, inputs = x.shape
    pieces = x.reshape(rows, inputs // (phases * lanes), lanes, phases)
    return pieces.swapaxes(2, 3).reshape(rows, inputs)


def _permute(x_ref, out_ref, *, phases: int, lanes: int):
    """``interleaved`` by a product with a permutation, piece by piece."""
    width = phases * lanes
    place = lax.broadcasted_iota(jnp.int32, (width, width), 1)
    source = place % lanes * phases + place // lanes
    chosen = source == lax.broadcasted_iota(jnp.int32, (width, width), 0)
    chosen = chosen.astype(x_ref.dtype)
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    for start in range(0, x_ref.shape[1], width):
        moved = lax.dot_general(
            x_ref[:, start : start + width],
            chosen,
            (((1,), (0,)), ((), ())),
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        out_ref[:, start : start + width] = moved.astype(out_ref.dtype)


def in_order(x, plan: Plan, reading: Reading, interpret: bool):
    """``interleaved`` x: few rows by XLA, which would copy many rows several times."""
    lanes, phases = plan.lanes(reading), reading.phases
    if phases == 1 or len(x) <= FEW:
        return interleaved(x, phases, lanes)
    rows, inputs = min(len(x), 256), plan.tile(2048)
    tile = pl.BlockSpec((rows, inputs), lambda m, k: (m, k))
    return pl.pallas_call(
        functools.partial(_permute, phases=phases, lanes=lanes),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(pl.cdiv(len(x), rows), plan.inputs // inputs),
        in_specs=[tile],
        out_specs=tile,
        interpret=interpret,
        name="order_inputs",
    )(x)


def block_sums(x, plan: Plan):
    """float32 sums of x over each block: many rows by a product with 0/1."""
    if len(x) <= FEW:
        return x.astype(jnp.float32).reshape(len(x), plan.blocks, -1).sum(-1)
    own = jnp.arange(plan.inputs)[:, None] // plan.block == jnp.arange(plan.blocks)
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    own = own.astype(x.dtype)
    return jnp.dot(x, own, precision=exact, preferred_element_type=jnp.float32)


def activations(x, plan: Plan, groups: Groups | None, interpret: bool) -> list:
    """What each width of plane is multiplied with."""
    found = {}
    for i, reading in enumerate(plan.readings):
        if reading.part not in found:
            own = in_order(x, plan, reading, interpret)
            if groups:
                own = separated(own, plan, reading, groups.pieces[i])
            found[reading.part] = own
    return list(found.values())


def separated(x, plan: Plan, reading: Reading, group: int):
    """Row b M + m: row m of ordered x where slot b of its group is, zero elsewhere."""
    inputs = x.shape[1]
    lanes = plan.lanes(reading)
    place = jnp.arange(inputs)
    byte = place // (lanes * reading.phases) % group * lanes + place % lanes
    slots = jnp.arange(group * plan.slots(reading))
    here = byte // plan.slot(reading) == slots[:, None]
    return jnp.where(here[:, None], x[None], 0).reshape(-1, inputs)
