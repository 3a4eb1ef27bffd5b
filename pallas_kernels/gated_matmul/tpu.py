"""TPU: the list of active blocks is prefetched and steers the copies of weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_matmul.reference import check
from pallas_kernels.mxu import dot


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Outputs in a tile: a step copies ``outputs`` x ``block`` weights."""

    outputs: int = 2048


def gated_matmul(
    x,
    w,
    index,
    count,
    *,
    block: int = 128,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.gated_matmul`` for blocks of whole lanes and at most 256 rows.

    Steps beyond ``count`` name the last active block again, which the pipeline does
    not copy twice, and compute nothing.
    """
    check(x, w, index, block)
    lead, inputs = x.shape[:-1], x.shape[-1]
    x2 = x.reshape(-1, inputs)
    if block % 128:
        raise NotImplementedError(
            f"blocks of {block} inputs are not whole lanes of 128"
        )
    if len(x2) > 256:
        raise NotImplementedError(
            f"{len(x2)} rows: a gate that all share is for decode"
        )
    rows = -(-len(x2) // 16) * 16
    x2 = jnp.pad(x2, ((0, rows - len(x2)), (0, 0)))
    outputs = w.shape[1]
    tile = min((tuning or Tuning()).outputs, -(-outputs // 128) * 128)

    def here(i, index, count):
        return index[jnp.minimum(i, jnp.maximum(count[0] - 1, 0))]

    y = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(outputs, tile), len(index)),
            in_specs=[
                pl.BlockSpec((rows, block), lambda j, i, *s: (0, here(i, *s))),
                pl.BlockSpec((block, tile), lambda j, i, *s: (here(i, *s), j)),
            ],
            out_specs=pl.BlockSpec((rows, tile), lambda j, i, *s: (0, j)),
            scratch_shapes=[pltpu.VMEM((rows, tile), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
        name="gated_matmul",
    )(index.astype(jnp.int32), count.astype(jnp.int32).reshape(1), x2, w)
    return y[: x.size // inputs].reshape(*lead, outputs)


def _kernel(index_ref, count_ref, x_ref, w_ref, y_ref, sum_ref):
    """Add an active block; the last step writes."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step < count_ref[0])
    def _():
        sum_ref[...] += dot(x_ref[...], w_ref[...].astype(x_ref.dtype))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)
