"""TPU: five trits to a byte, by division with a multiplication and a shift.

A byte holds five neighbouring inputs, so blocks of scales end inside bytes: the scale
of the byte j at place p is that of block (5 j + p) / block. The place p of 128 bytes
meets the inputs 5 j + p of x, which is put in that order. Rows of bytes end inside the
last 128 lanes; what is read beyond them meets zeros of x.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import NT, TN, dot, ones_where, product_of_terms
from pallas_kernels.plane_matmul.reference import block_sums
from pallas_kernels.quantized_matmul.tpu_inputs import interleaved

LANES = 128
HELD = 5  # trits in a byte
PIECES = 4  # of 128 bytes in a step


def trit_matmul(x, planes, scales, bias, *, block: int | None, interpret: bool):
    """``reference.plane_matmul`` of kind "trits"."""
    lead, inputs = x.shape[:-1], x.shape[-1]
    rows, (outputs, width) = x.reshape(-1, inputs), planes[0].shape
    if outputs % 32 or not len(rows):
        raise NotImplementedError(
            f"{len(rows)} rows, {outputs} outputs: accepted are at least one row and "
            "a multiple of 32 outputs"
        )
    pieces = -(-width // LANES)
    step = LANES * min(PIECES, pieces)
    steps = pl.cdiv(width, step)
    bm, bn = min(-(-len(rows) // 16) * 16, 256), min(outputs, 512)
    short = -len(rows) % bm, steps * step * HELD - inputs
    ordered = interleaved(jnp.pad(rows, ((0, short[0]), (0, short[1]))), HELD, LANES)
    scales = [scale.T for scale in scales]  # on a TPU the long axis is minor
    y = pl.pallas_call(
        functools.partial(_kernel, size=block or inputs),
        out_shape=jax.ShapeDtypeStruct((len(ordered), outputs), jnp.float32),
        grid=(len(ordered) // bm, pl.cdiv(outputs, bn), steps),
        in_specs=[
            pl.BlockSpec((bm, step * HELD), lambda m, n, k: (m, k)),
            [pl.BlockSpec((bn, step), lambda m, n, k: (n, k)) for _ in planes],
            [pl.BlockSpec((len(s), bn), lambda m, n, k: (0, n)) for s in scales],
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="trit_matmul",
    )(ordered, list(planes), scales)[: len(rows)]
    if bias is not None:
        y = y + dot(block_sums(rows, block or inputs), bias.astype(jnp.float32), NT)
    return y.astype(x.dtype).reshape(*lead, outputs)


def _kernel(x_ref, planes, scales, y_ref, *, size: int):
    """Add one step: every plane, 128 bytes and one place after the other."""
    step, width = pl.program_id(2), planes[0].shape[1]

    @pl.when(step == 0)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    for start in range(0, width, LANES):
        rests = [p[:, start : start + LANES].astype(jnp.int32) for p in planes]
        for place in range(HELD):
            at = start * HELD + place * LANES
            x = x_ref[:, at : at + LANES]
            w = jnp.zeros(rests[0].shape, jnp.float32)
            for i, scale in enumerate(scales):
                quotient = (rests[i] * 171) >> 9  # bytes / 3
                trit = (rests[i] - 3 * quotient - 1).astype(jnp.float32)
                rests[i] = quotient
                first = step * width + start
                w += trit * _spread(scale[...], first, place, size)
            y_ref[...] += dot(x, w.astype(x.dtype), NT)


def _spread(scale, first, place: int, size: int):
    """The scale [blocks, outputs] of 128 bytes at one place, by a 0/1 product."""
    shape = (len(scale), LANES)
    byte = first + lax.broadcasted_iota(jnp.int32, shape, 1)
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    inside = ones_where((byte * HELD + place) // size == block, jnp.bfloat16)
    return product_of_terms(scale, inside, TN)
