"""Learned rounding whose weights may first move by a low-rank term."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import as_stored, straight_through
from jaxllm.core.formats import TINY, Format
from jaxllm.core.reconstruct import Parametrization
from jaxllm.core.scales import Grid, fit_all, group_of, group_peaks, mse
from jaxllm.core.spec import expression

WIDE = 0.98  # ranges start at most so wide: beyond, sigmoid has no slope


@expression
def compensated(format: Format, group_size: int | None = None, rank: int = 1):
    """Q(W + a b): a learned clipping of a symmetric format, and a term of ``rank``.

    Distribution correction (ABQ-LLM, arXiv:2408.08554, eq. 4): a [in, rank] starts at
    one, b [rank, out] at zero, and the sum is rounded, so that nothing is added at run
    time. The scale of a group is sigmoid(gamma) max|w + a b| / largest; gamma starts at
    the range of least squared error, where the paper starts at sigmoid(4).
    """
    if not format.symmetric or rank < 0:
        raise ValueError(f"compensated({format}, rank={rank}): symmetric, rank >= 0")
    grid = Grid(format, group_size, mse(0.3, 29))

    def begin(w, stats, key):
        scale, _ = fit_all(grid, w, jnp.ones(len(w)), None)
        peaks = group_peaks(grid, jnp.abs(w))
        share = scale * format.largest / jnp.maximum(peaks, TINY)
        gamma = jax.scipy.special.logit(jnp.clip(share, 0.1, WIDE))
        b = jnp.zeros((rank, w.shape[1]))
        return dict(gamma=gamma, a=jnp.ones((len(w), rank)), b=b)

    def moved(theta, w):
        """W + a b and its scales [groups, out], as stored, with gradients."""
        w = w + theta["a"] @ theta["b"]
        peaks = group_peaks(grid, jnp.abs(w))
        scale = jax.nn.sigmoid(theta["gamma"]) * peaks / format.largest
        scale = jnp.maximum(scale, TINY)
        stored = as_stored(scale)
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
