"""Attention's inner step on a Hopper warpgroup: scores, running softmax, values.

Shared by the Mosaic GPU attention kernels. A warpgroup holds 64 query rows; ``peak``
is the running maximum in units of log 2, so that one multiply-add and one ``exp2`` make
a probability; ``total`` is the running sum (Milakov and Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

import contextlib
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

ROWS = 64  # of a warpgroup's tile, the M of wgmma
LOG2E = math.log2(math.e)
LOWEST = -1e30  # finite: a row that has seen no key stays free of NaN


def tiles(shape, dtype, swizzle: int = 128):
    """Shared memory in the layout that TMA writes and wgmma reads: swizzled rows.

    Both operands of a wgmma need the same swizzle (bytes; a row's at most).
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * itemsize)
    rows = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(rows, plgpu.SwizzleTransform(swizzle)))


def rows_to(values, shape):
    """One value per row, along the columns."""
    return lax.broadcast_in_dim(values, shape, [0])


def start(*widths: int, first=None):
    """The empty state: accumulators [64, width], maximum and sum [64].

    ``first`` is a logit in units of log 2 that has no value: it begins the sum.
    """
    wide, narrow = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    acc = tuple(
        plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), wide)
        for width in widths
    )
    full = lambda value: plgpu.layout_cast(  # noqa: E731
        jnp.full((ROWS,), value, jnp.float32), narrow
    )
    if first is None:
        return acc, full(LOWEST), full(0.0)
    return acc, full(first), full(1.0)


def scores(q, k, after_issue=None):
    """q k^T for tiles in shared memory, [64, keys]; float32.

    ``q`` and ``k`` are tuples: the head dimension may be in parts.
    """

    def run(acc):
        for left, right in zip(q, k, strict=True):
            plgpu.wgmma(acc, left, compat.transposed(right))
        if after_issue is not None:
            after_issue()
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((q[0].shape[0], k[0].shape[0]), jnp.float32))


def logits(s, scale: float, soft_cap: float | None):
    """Scores times ``scale`` (and capped), in units of log 2, and what is left to do.

    Returns (s, factor): the maximum commutes with a positive factor, so it is applied
    to the row's maximum and inside the exponent's multiply-add.
    """
    if soft_cap is None:
        return s, scale * LOG2E
    return jnp.tanh(s * (scale / soft_cap)), soft_cap * LOG2E


def update(s, factor, state):
    """The probabilities of ``s`` [64, keys] under the new maximum; the state rescaled.

    ``factor`` is positive: one number, or one a row. The caller adds the
    probabilities to ``total`` and the values to ``acc``, when that suits the schedule.
    """
    acc, peak, total = state
    wide = factor if isinstance(factor, float) else rows_to(factor, s.shape)
    new = jnp.maximum(peak, s.max(axis=1) * factor)
    p = jnp.exp2(s * wide - rows_to(new, s.shape))
    alpha = jnp.exp2(peak - new)
    acc = tuple(a * rows_to(alpha, a.shape) for a in acc)
    return p, (acc, new, total * alpha)


def values(acc, p, v, staging=None):
    """acc + p v, with p in registers.

    ``staging`` is shared memory for p: the interpreter has no wgmma with a register
    operand, and no accumulator that starts from a value.
    """
    if staging is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))
    staging[...] = p
    plgpu.commit_smem()
    return accumulate(acc, staging, v, interpret=True)


def accumulate(acc, a, b, interpret: bool):
    """acc + a b for tiles in shared memory.

    The interpreter has no accumulator that starts from a value.
    """
    if not interpret:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))

    def product(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def normalized(acc, total):
    """acc / total; zero for a row that has seen no key."""
    total = jnp.where(total == 0.0, jnp.ones_like(total), total)
    return acc * rows_to(1.0 / total, acc.shape)


def check_dtypes(*arrays: jax.Array, interpret: bool) -> None:
    """Refuse what the 16-bit tensor cores cannot take; the interpreter takes more."""
    kinds = sorted({str(a.dtype) for a in arrays})
    served = (["bfloat16"], ["float16"], *((["float32"],) if interpret else ()))
    if kinds not in served:
        raise NotImplementedError(f"dtypes {kinds}; the kernel takes bfloat16, float16")


def running(interpret: bool):
    """The context in which a kernel is called: the interpreter's, or none."""
    compat.require_hopper(interpret)
    if not interpret:
        return contextlib.nullcontext()
    if compat.VERSION < (0, 11):
        raise NotImplementedError("jax 0.10's interpreter knows no register layouts")
    return compat.interpret_gpu()
