"""TPU: 4-bit codes become int8 four to a word and meet int8 rows of x.

A byte holds two neighbouring inputs. Instead of moving weights across lanes, the
inputs of x are put into the order that unpacking leaves behind: within each 256 the
even ones, then the odd ones. Many rows share an int8 tile of (code - zero) scale
(``tpu_many``). For few rows each group's sum is a product of its own, and the zero
point acts on sums of x; since two groups of 128 share 128 bytes, the rows are written
twice, once for each group with zeros at the other's inputs.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.integer_tiles import Tuning, scaled_sums
from pallas_kernels.mxu import NT, product
from pallas_kernels.two_level_matmul.reference import check
from pallas_kernels.two_level_matmul.tpu_many import PIECE, many_rows
from pallas_kernels.two_level_matmul.tpu_many import default_tuning as many_tuning

FEW = 64  # rows that are worth writing twice


def two_level_matmul(
    x_codes,
    planes,
    group_scale,
    group_zero,
    x_scale,
    w_scale,
    *,
    bits: int = 4,
    block: int = 128,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.two_level_matmul``; groups of 128 or of multiples of 256."""
    check(x_codes, planes, group_scale, group_zero, x_scale, w_scale, bits, block)
    lead, inputs = x_codes.shape[:-1], x_codes.shape[-1]
    if bits != 4 or (block != 128 and block % 256) or inputs % max(block, 256):
        raise NotImplementedError(
            f"{bits}-bit codes in groups of {block} along {inputs} inputs; this kernel "
            "has 4 bits, groups of 128 or multiples of 256, and whole pairs of them"
        )
    x, x_scale = x_codes.reshape(-1, inputs), x_scale.reshape(-1, 1)
    outputs, unit = len(planes[0]), max(PIECE, block)
    if group_zero is None:
        group_zero = jnp.full(group_scale.shape, 2 ** (bits - 1), jnp.uint8)
    options = {"out_dtype": out_dtype, "interpret": interpret}
    operands = planes[0], group_scale, group_zero
    if len(x) > FEW:
        tuning = tuning or many_tuning(len(x), outputs, inputs, unit)
        scales, options = (x_scale, w_scale), {**options, "tuning": tuning}
        y = many_rows(_evens_first(x), *operands, *scales, block=block, **options)
        return y.reshape(*lead, outputs)
    twice = block < PIECE  # 16 rows then fill a tile of int8
    tuning = tuning or Tuning.default(len(x), inputs, unit, 16 if twice else 32)
    operands, specs = _few_rows(x, *operands, tuning, block)
    y = scaled_sums(
        functools.partial(_add_few, block=block),
        operands,
        specs,
        x_scale,
        w_scale,
        steps=inputs // tuning.inputs,
        tuning=tuning,
        name="two_level_matmul",
        **options,
    )
    return y.reshape(*lead, outputs)


def _few_rows(x, plane, scale, zero, tuning: Tuning, block: int):
    """Operands of ``_add_few`` and their tiles: one of rows."""
    tm, tn, tk = tuning.rows, tuning.outputs, tuning.inputs
    outputs, groups = len(plane), tk // block
    x = tuning.padded(x)
    sums = x.astype(jnp.int32).reshape(tm, -1, groups, block).sum(-1).swapaxes(0, 1)
    x = _evens_first(x)
    if block < PIECE:  # rows of each group of a piece, zero at the other's inputs
        lane = jnp.arange(x.shape[1]) % 128
        own = jnp.arange(2)[:, None] == lane // 64
        x = jnp.where(own[:, None], x[None], jnp.int8(0)).reshape(2 * tm, -1)
    scale, zero = (a.T.reshape(-1, groups, outputs) for a in (scale, zero))
    per_group = pl.BlockSpec((1, groups, tn), lambda i, j, k: (k, 0, j))
    return (x, plane, scale, zero, sums), [
        pl.BlockSpec((len(x), tk), lambda i, j, k: (0, k)),
        pl.BlockSpec((tn, tk // 2), lambda i, j, k: (j, k)),
        per_group,
        per_group,
        pl.BlockSpec((1, tm, groups), lambda i, j, k: (k, 0, 0)),
    ]


def _evens_first(x):
    """Within each piece: even inputs, then odd ones."""
    pairs = x.reshape(len(x), -1, PIECE // 2, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(x.shape)


def _add_few(x_ref, w_ref, scale_ref, zero_ref, x_sum_ref, sum_ref, *, block):
    """Int32 sums of each group's codes, less zero times sum(x), times its scale."""
    scale, zero = (ref[0].astype(jnp.int32) for ref in (scale_ref, zero_ref))
    rows, groups = x_sum_ref.shape[1:]
    total = sum_ref[...]
    together = max(1, PIECE // block)
    for first in range(0, groups, together):
        part = 0
        for start in range(first * block, (first + together) * block, PIECE):
            words = pltpu.bitcast(w_ref[:, pl.ds(start // 2, 128)], jnp.int32)
            for at, code in ((start, words), (start + 128, words >> 4)):
                w = pltpu.bitcast(_low(code), jnp.int8)
                part += product(x_ref[:, pl.ds(at, 128)], w, NT)
        for i in range(together):
            g = slice(first + i, first + i + 1)
            own = part[i * rows : (i + 1) * rows]
            total += (own - x_sum_ref[0, :, g] * zero[g]) * scale[g]
    sum_ref[...] = total


def _low(words):
    return words & 0x0F0F0F0F
