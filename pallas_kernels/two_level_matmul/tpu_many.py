"""TPU, many rows: an int8 tile of (code - zero) scale is made once, then multiplied.

Four outputs share an int32 word of stored bytes. A code that is masked where it stands
and multiplied with the scale of its output stays at its byte, and the four products
add up to one word. That is shifted by 128 in each byte before zero times scale is
taken off: since every weight fits into int8, no byte then borrows from the next.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.integer_tiles import Tuning
from pallas_kernels.mxu import by_rows, depth, multiply_scaled, tiles

PIECE = 256  # inputs in the 128 bytes of whole lanes: low nibbles, then high ones
GROUP = 128  # outputs whose scales are in registers at a time
CHUNK = 512  # rows in a turn of a loop
LOWS = (0, 8, 16, 24)  # bits below each byte of a word
MIDDLE = -0x7F7F7F80  # 128 in each byte


def default_tuning(rows: int, outputs: int, inputs: int, unit: int) -> Tuning:
    """The longest sums, and as many rows to a tile of the weight as VMEM holds."""
    return Tuning(*tiles(rows, outputs), Tuning.default(rows, inputs, unit).inputs)


def many_rows(
    x, plane, scale, zero, x_scale, w_scale, *, block, tuning, out_dtype, interpret
):
    """y = x_scale w_scale sum_k x (code - zero) scale; x has evens first by piece.

    Every (code - zero) scale fits into int8; ``scale`` and ``zero`` are 0 to 255.
    """
    tm, tn, tk = tuning.rows, tuning.outputs, tuning.inputs
    (rows, inputs), outputs, groups = x.shape, len(plane), tk // block
    x, x_scale = tuning.padded(x), tuning.padded(x_scale)
    steps = inputs // tk
    # Each group has a lane; bytes of four outputs then share a word.
    lanes = ((0, 0), (0, 0), (0, -groups % 128))
    small = (
        jnp.pad(a.astype(jnp.uint8).reshape(outputs, steps, groups), lanes)
        for a in (scale, zero)
    )
    per_group = pl.BlockSpec(
        (None, tn, groups + lanes[2][1]), lambda i, j, k: (k, j, 0)
    )
    y = pl.pallas_call(
        functools.partial(_kernel, block=block, steps=steps),
        grid=(len(x) // tm, pl.cdiv(outputs, tn), steps),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda i, j, k: (i, k)),
            pl.BlockSpec((tn, tk // 2), lambda i, j, k: (j, k)),
            per_group,
            per_group,
            pl.BlockSpec((tm, 1), lambda i, j, k: (i, 0)),
            pl.BlockSpec((1, tn), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((tm, tn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), out_dtype),
        scratch_shapes=[
            pltpu.VMEM((tm, tn), jnp.int32),
            pltpu.VMEM((tn, tk), jnp.int8),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="two_level_matmul",
    )(
        x,
        plane,
        *(jnp.swapaxes(a, 0, 1) for a in small),
        x_scale,
        w_scale.reshape(1, -1),
    )
    return y[:rows]


def _kernel(
    x_ref,
    w_ref,
    scale_ref,
    zero_ref,
    x_scale_ref,
    w_scale_ref,
    y_ref,
    sum_ref,
    tile_ref,
    *,
    block: int,
    steps: int,
):
    """One step of the sum over inputs."""
    fill = functools.partial(_fill, tile_ref, w_ref, scale_ref, zero_ref, block=block)
    by_rows(fill, len(w_ref), GROUP)
    multiply_scaled(
        x_ref,
        tile_ref,
        (x_scale_ref, w_scale_ref),
        y_ref,
        sum_ref,
        steps=steps,
        chunk=CHUNK,
        depth=depth(jnp.int8),
    )


def _fill(tile_ref, w_ref, scale_ref, zero_ref, outputs, *, block: int):
    """(code - zero) scale of some ``outputs``: words of [outputs / 4, inputs]."""
    scales, zeros = (
        [pltpu.bitcast(ref[outputs, :], jnp.int32) >> low & 0xFF for low in LOWS]
        for ref in (scale_ref, zero_ref)
    )
    taken = sum(s * z << low for s, z, low in zip(scales, zeros, LOWS, strict=True))
    offset = MIDDLE - taken
    lane = lax.broadcasted_iota(jnp.int32, (len(offset), 128), 1)
    for start in range(0, w_ref.shape[1], 128):
        group = (start + lane) // (block // 2)
        spread = functools.partial(
            jnp.take_along_axis, indices=group, axis=1, mode="promise_in_bounds"
        )
        words = pltpu.bitcast(w_ref[outputs, pl.ds(start, 128)], jnp.int32)
        *own, shift = map(spread, (*scales, offset))
        for at, codes in ((2 * start, words), (2 * start + 128, words >> 4)):
            total = shift
            for low, scale in zip(LOWS, own, strict=True):
                total = total + (codes & (0xF << low)) * scale
            tile_ref[outputs, pl.ds(at, 128)] = pltpu.bitcast(total ^ MIDDLE, jnp.int8)
