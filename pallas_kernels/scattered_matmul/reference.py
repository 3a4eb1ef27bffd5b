"""y = x W for a matrix of few entries, as differences of prefix sums."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float
from pallas_kernels.scattered_matmul.segments import (
    GROUP,
    SLOTS,
    STRIPE,
    WINDOW,
    Segments,
    unpack,
)

FEW = 256  # rows up to which there is a product for each slot
TOGETHER = 16  # of them


def check(x, segments: Segments, outputs: int) -> None:
    """ValueError names the argument that does not fit the others."""
    count = GROUP * len(segments.stripe)
    wide = (count, SLOTS)
    shapes = Segments(segments.stripe.shape[:1], (count,), wide, wide, wide)
    for (name, a), shape in zip(segments._asdict().items(), shapes, strict=True):
        if a.shape != shape:
            raise ValueError(f"{name} {a.shape}; accepted: {shape}")
    if outputs < 1:
        raise ValueError(f"{outputs} outputs; accepted: 1 or more")


def scattered_matmul(
    x: Float[Array, "*batch in"], segments: Segments, *, outputs: int
) -> Float[Array, "*batch out"]:
    """y[r, o] = sum over the entries (i, o, v) of x[r, i] v.

    Products and prefix sums are float32, the result has the dtype of ``x``, which has
    the inputs of the packed matrix: segments do not tell how many, and what they list
    beyond the width of ``x`` is undefined. Outliers beside packed weights are such a
    matrix (SpQR, arXiv:2306.03078; SqueezeLLM, arXiv:2306.07629).
    """
    check(x, segments, outputs)
    shape = math.prod(x.shape[:-1]), x.shape[-1]
    rows = x.reshape(shape).astype(jnp.float32)
    if len(rows) > FEW:
        y = rows @ unpack(segments, (shape[1], outputs)).astype(jnp.float32)
        return y.astype(x.dtype).reshape(*x.shape[:-1], outputs)
    window = segments.window.astype(jnp.int32)[:, None]
    source = window * WINDOW + segments.place.astype(jnp.int32)
    stripes = -(-outputs // STRIPE)

    def multiply(row):
        found = row.at[source].get(mode="fill", fill_value=0)
        sums = jnp.cumsum(found * segments.value.astype(jnp.float32), 1)
        sums = jnp.pad(sums, ((0, 0), (1, 0)))
        whole = jnp.take_along_axis(sums, segments.end.astype(jnp.int32), 1)
        whole = whole.reshape(-1, GROUP, STRIPE).sum(1)
        y = jax.ops.segment_sum(whole, segments.stripe, stripes)
        return jnp.diff(y, prepend=0.0).ravel()[:outputs]

    y = jax.lax.map(multiply, rows, batch_size=TOGETHER)
    return y.astype(x.dtype).reshape(*x.shape[:-1], outputs)
