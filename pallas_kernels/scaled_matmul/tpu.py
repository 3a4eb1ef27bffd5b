"""TPU: 8-bit tiles straight into the matrix unit, scales once per sum."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import depth, multiply_scaled, tiles
from pallas_kernels.scaled_matmul.reference import check


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes: rows of x, outputs, inputs; ``chunk`` rows in a turn of a loop."""

    rows: int
    outputs: int
    inputs: int
    chunk: int = 512


def default_tuning(rows: int, outputs: int, inputs: int, width: int) -> Tuning:
    """Long sums, and as many rows to a tile of the weight as VMEM holds."""
    return Tuning(*tiles(rows, outputs), _divisor(inputs, width, 5120))


def scaled_matmul(
    x_codes,
    w_codes,
    x_scale,
    w_scale,
    *,
    block: int | None = None,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.scaled_matmul`` on the matrix unit; grid (rows, outputs, inputs)."""
    width = check(x_codes, w_codes, x_scale, w_scale, block)
    lead, inputs = x_codes.shape[:-1], x_codes.shape[-1]
    x = x_codes.reshape(-1, inputs)
    rows, outputs = len(x), len(w_codes)
    tuning = tuning or default_tuning(rows, outputs, inputs, width)
    tm, tn, tk = tuning.rows, tuning.outputs, tuning.inputs
    padded = _round_up(rows, tm)
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    x_scale = jnp.pad(x_scale.reshape(-1, 1), ((0, padded - rows), (0, 0)))
    blocks = -(-tk // width)
    per_step = w_scale.shape[1] > 1
    steps = inputs // tk
    y = pl.pallas_call(
        functools.partial(
            _kernel, width=width if per_step else None, steps=steps, chunk=tuning.chunk
        ),
        grid=(padded // tm, pl.cdiv(outputs, tn), steps),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda i, j, k: (i, k)),
            pl.BlockSpec((tn, tk), lambda i, j, k: (j, k)),
            pl.BlockSpec((tm, 1), lambda i, j, k: (i, 0)),
            pl.BlockSpec(
                (None, blocks, tn), lambda i, j, k: (k if per_step else 0, 0, j)
            ),
        ],
        out_specs=pl.BlockSpec((tm, tn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), out_dtype),
        scratch_shapes=[pltpu.VMEM((tm, tn), _kind(x, per_step))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="scaled_matmul",
    )(x, w_codes, x_scale, w_scale.T.reshape(-1, blocks, outputs))
    return y[:rows].reshape(*lead, outputs)


def _kernel(
    x_ref, w_ref, x_scale_ref, w_scale_ref, y_ref, sum_ref, *, width, **options
):
    """One step of the sum over inputs; ``width`` of them share a scale (None: all)."""

    def weigh(product, n, k):
        block = k.start // width
        return product.astype(jnp.float32) * w_scale_ref[block : block + 1, n]

    multiply_scaled(
        x_ref,
        w_ref,
        (x_scale_ref, None if width else w_scale_ref),
        y_ref,
        sum_ref,
        depth=width or depth(x_ref.dtype),
        weigh=weigh if width else None,
        **options,
    )


def _kind(x, per_step: bool):
    return jnp.int32 if x.dtype == jnp.int8 and not per_step else jnp.float32


def _divisor(inputs: int, width: int, most: int) -> int:
    """The largest tile of whole blocks and lanes that divides ``inputs``."""
    unit = 128 if width == inputs else max(128, width)
    tiles = range(most - most % unit, 0, -unit)
    return next((t for t in tiles if inputs % t == 0), inputs)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
