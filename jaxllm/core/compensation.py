"""Learned rounding whose weights may first move by a low-rank term."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.formats import TINY, Format
from jaxllm.core.reconstruct import Parametrization, straight_through
from jaxllm.core.scales import Grid, group_of
from jaxllm.core.spec import expression

OPEN = 4.0  # sigmoid(4) = 0.982: ranges start almost whole


@expression
def compensated(format: Format, group_size: int | None = None, rank: int = 1):
    """Q(W + a b): a learned clipping of a symmetric format, and a term of ``rank``.

    Distribution correction (ABQ-LLM, arXiv:2408.08554, eq. 4): a [in, rank] starts at
    one, b [rank, out] at zero, and the sum is rounded, so that nothing is added at run
    time. The scale of a group is sigmoid(gamma) max|w + a b| / largest.
    """
    if not format.symmetric or rank < 0:
        raise ValueError(f"compensated({format}, rank={rank}): symmetric, rank >= 0")
    grid = Grid(format, group_size)

    def begin(w, stats, key):
        count = -(-len(w) // min(group_size or len(w), len(w)))
        gamma = jnp.full((count, w.shape[1]), OPEN)
        return dict(
            gamma=gamma, a=jnp.ones((len(w), rank)), b=jnp.zeros((rank, w.shape[1]))
        )

    def moved(theta, w):
        """W + a b and its scales [groups, out], as stored, with gradients."""
        w = w + theta["a"] @ theta["b"]
        peak = jax.ops.segment_max(
            jnp.abs(w), group_of(grid, len(w)), len(theta["gamma"])
        )
        scale = jax.nn.sigmoid(theta["gamma"]) * peak / format.largest
        scale = jnp.maximum(scale, TINY)
        stored = scale.astype(jnp.bfloat16).astype(jnp.float32)
        return w, straight_through(stored, scale)

    def soft(theta, w):
        w, scale = moved(theta, w)
        wide = scale[group_of(grid, len(w))]
        u = w / wide
        near = format.decode(format.encode(u))
        low, high = format.decode(jnp.asarray((0, format.codes - 1)))
        return straight_through(near, jnp.clip(u, low, high)) * wide

    def render(theta, w):
        values, scale = moved(theta, w)
        return grid.pack(values, (scale, None), None, w.dtype)

    return Parametrization(begin, soft, render)
