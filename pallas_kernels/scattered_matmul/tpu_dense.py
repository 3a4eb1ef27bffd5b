"""TPU: the dense matrix of segments, a group of one stripe after the other.

A segment is a product of two matrices of few entries: its values at their places, and
ones at the outputs of its slots. XLA would scatter one entry at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import before, ones_where, product_of_terms
from pallas_kernels.scattered_matmul.segments import (
    GROUP,
    SLOTS,
    STRIPE,
    WINDOW,
    Segments,
)

VMEM = 64 * 2**20


def unpack(segments: Segments, shape: tuple[int, int], *, interpret: bool = False):
    """``segments.unpack``, exactly, without leading axes."""
    inputs, outputs = (
        pl.cdiv(n, s) * s for n, s in zip(shape, (WINDOW, STRIPE), strict=True)
    )
    value = segments.value
    if value.dtype != jnp.bfloat16:
        value = value.astype(jnp.float32)
    if 2 * inputs * STRIPE * value.dtype.itemsize > VMEM // 2:
        raise NotImplementedError(f"a stripe of {inputs} inputs does not fit into VMEM")
    last = outputs // STRIPE - 1
    listed = pl.BlockSpec((1, GROUP, SLOTS), lambda g, *_: (g, 0, 0))
    grouped = lambda a: a.reshape(-1, GROUP, SLOTS)  # noqa: E731
    dense = pl.pallas_call(
        functools.partial(_kernel, last=last),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(segments.stripe),),
            in_specs=[listed] * 3,
            out_specs=pl.BlockSpec(
                (inputs, STRIPE), lambda g, stripe, _: (0, jnp.minimum(stripe[g], last))
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((inputs, outputs), value.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="scattered_dense",
    )(
        segments.stripe.astype(jnp.int32),
        segments.window.astype(jnp.int32),
        *map(grouped, (segments.place, segments.end, value)),
    )
    return dense[: shape[0], : shape[1]].astype(segments.value.dtype)


def _kernel(stripe_ref, window_ref, place_ref, end_ref, value_ref, dense_ref, *, last):
    """Every stripe has a group, and the first one clears it."""
    group = pl.program_id(0)
    stripe, previous = stripe_ref[group], stripe_ref[jnp.maximum(group - 1, 0)]

    @pl.when((group == 0) | (stripe > previous) & (stripe <= last))
    def _():
        dense_ref[...] = jnp.zeros(dense_ref.shape, dense_ref.dtype)

    slot = lax.broadcasted_iota(jnp.int32, (SLOTS, STRIPE), 0)

    def row(ref, s, dtype):
        return jnp.broadcast_to(ref[0, s : s + 1, :].astype(dtype), slot.shape)

    @pl.when(stripe <= last)
    def _():
        for s in range(GROUP):
            end = row(end_ref, s, jnp.int32)
            owned = ones_where((before(end) <= slot) & (slot < end), jnp.bfloat16)
            place, values = row(place_ref, s, jnp.int32), row(value_ref, s, jnp.float32)
            window = pl.multiple_of(window_ref[group * GROUP + s] * WINDOW, WINDOW)
            for half in range(0, WINDOW, SLOTS):
                spread = jnp.where(place == slot + half, values, 0.0)
                spread = spread.astype(dense_ref.dtype)
                rows = pl.ds(window + half, SLOTS)
                dense = dense_ref[rows, :].astype(jnp.float32)
                dense += product_of_terms(spread, owned, count=3)
                dense_ref[rows, :] = dense.astype(dense_ref.dtype)
