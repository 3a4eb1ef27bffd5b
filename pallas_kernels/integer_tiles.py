"""TPU: tiles of exact int32 sums over the inputs, scaled per row and per output."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes: rows of x, outputs, inputs (whole units of the op)."""

    rows: int
    outputs: int
    inputs: int

    @classmethod
    def default(cls, rows: int, inputs: int, unit: int, height: int = 32) -> Tuning:
        """The widest tile of inputs that divides them, up to 4,096.

        Few rows are rounded up to ``height``: as many as share a register of int8.
        """
        tiles = range(4096 - 4096 % unit, 0, -unit)
        tile = next(t for t in tiles if inputs % t == 0)
        return cls(min(256, -(-rows // height) * height), 512, tile)

    def padded(self, a):
        """Zeros below the rows of ``a``, up to whole tiles."""
        return jnp.pad(a, ((0, -len(a) % self.rows), (0, 0)))


def scaled_sums(
    add: Callable,
    operands: tuple,
    specs: list,
    x_scale,
    w_scale,
    *,
    shift=None,
    steps: int,
    tuning: Tuning,
    out_dtype,
    interpret: bool,
    name: str,
):
    """y[m, n] = x_scale[m] w_scale[n] (sum over steps - shift[m]).

    ``add(*operands, sum_ref)`` adds a step's products to a tile; ``specs`` are the
    operands' over the grid (rows, outputs, steps).
    """
    tm, tn, outputs = tuning.rows, tuning.outputs, len(w_scale)
    columns = [tuning.padded(a) for a in (x_scale, shift) if a is not None]
    padded = len(columns[0])
    column = pl.BlockSpec((tm, 1), lambda i, j, k: (i, 0))
    y = pl.pallas_call(
        functools.partial(_kernel, add=add),
        grid=(padded // tm, pl.cdiv(outputs, tn), steps),
        in_specs=[
            *specs,
            [column] * len(columns),
            pl.BlockSpec((1, tn), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((tm, tn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), out_dtype),
        scratch_shapes=[pltpu.VMEM((tm, tn), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name=name,
    )(*operands, columns, w_scale.reshape(1, -1))
    return y[: len(x_scale)]


def _kernel(*refs, add: Callable):
    *own, (x_scale_ref, *shift_ref), w_scale_ref, y_ref, sum_ref = refs
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    add(*own, sum_ref)

    height = math.gcd(32, sum_ref.shape[0])

    def finish(i, _):
        rows = pl.ds(i * height, height)
        total = sum_ref[rows, :]
        for ref in shift_ref:
            total = total - ref[rows, :]
        y = total.astype(jnp.float32) * x_scale_ref[rows, :] * w_scale_ref[...]
        y_ref[rows, :] = y.astype(y_ref.dtype)

    @pl.when(step == steps - 1)
    def _():
        lax.fori_loop(0, sum_ref.shape[0] // height, finish, None)
