"""TPU: 8-bit tiles straight into the matrix unit, scales once per sum."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.scaled_matmul.reference import check


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes: rows of x, outputs, inputs."""

    rows: int
    outputs: int
    inputs: int


def default_tuning(rows: int, outputs: int, inputs: int, width: int) -> Tuning:
    """Long sums (4,096 inputs and more) keep the matrix unit busy without spills."""
    tile = _divisor(inputs, width, 5120)
    return Tuning(min(256, _round_up(rows, 32)), 1024 if rows > 256 else 512, tile)


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
        functools.partial(_kernel, width=min(width, tk), per_step=per_step),
        grid=(padded // tm, pl.cdiv(outputs, tn), steps),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda i, j, k: (i, k)),
            pl.BlockSpec((tn, tk), lambda i, j, k: (j, k)),
            pl.BlockSpec((tm, 1), lambda i, j, k: (i, 0)),
            pl.BlockSpec((1, blocks, tn), lambda i, j, k: (k if per_step else 0, 0, j)),
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


def _kernel(x_ref, w_ref, x_scale_ref, w_scale_ref, y_ref, sum_ref, *, width, per_step):
    """One step of the sum over inputs."""

    def part():
        total = 0
        inputs = x_ref.shape[1]
        for b in range(pl.cdiv(inputs, width)):
            here = pl.ds(b * width, min(width, inputs - b * width))
            product = _product(x_ref[:, here], w_ref[:, here])
            if per_step:
                product = product.astype(jnp.float32) * w_scale_ref[0, b : b + 1, :]
            total = total + product
        return total

    def finish(i, _):  # a loop of its own keeps the scales out of registers above
        rows = pl.ds(i * 32, 32)
        y = sum_ref[rows, :].astype(jnp.float32) * x_scale_ref[rows, :]
        y = y if per_step else y * w_scale_ref[0]
        y_ref[rows, :] = y.astype(y_ref.dtype)

    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = part()

    @pl.when(step > 0)
    def _():
        sum_ref[...] += part()

    @pl.when(step == steps - 1)
    def _():
        lax.fori_loop(0, sum_ref.shape[0] // 32, finish, None)


def _product(x, w):
    """x W^T; both have their inputs in the minor axis."""
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=kind)


def _kind(x, per_step: bool):
    return jnp.int32 if x.dtype == jnp.int8 and not per_step else jnp.float32


def _divisor(inputs: int, width: int, most: int) -> int:
    """The largest tile of whole blocks and lanes that divides ``inputs``."""
    unit = 128 if width == inputs else max(128, width)
    tiles = range(most - most % unit, 0, -unit)
    return next((t for t in tiles if inputs % t == 0), inputs)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
