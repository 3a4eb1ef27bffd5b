"""Masks that are learned: which weights stay, as something gradients move."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import straight_through
from jaxllm.core.patterns import Pattern
from jaxllm.core.reconstruct import Parametrization
from jaxllm.core.spec import expression


@expression
def scored_mask(density: float, rank: int = 8, share: float = 1.0):
    """The share ``density`` of largest S = |W + U V| + a (A B + R + C) stays.

    U V and A B are low-rank [in, ``rank``] x [rank, out], R [in, 1] and C [1, out] one
    number per row and column, a = ``share``. The mask's gradient is handed to S as it
    is; at the start S = |W| (PST, arXiv:2205.11005, eq. 6 to 9).
    """
    pattern = Pattern(density, joint=True)
    if rank < 1:
        raise ValueError(f"rank {rank}; accepted: at least 1")

    def start(w, stats, key):
        first, second = jax.random.split(key)
        wide = lambda k: 0.02 * jax.random.normal(k, (len(w), rank))  # noqa: E731
        thin = jnp.zeros((rank, w.shape[1]))
        ends = dict(rows=jnp.zeros((len(w), 1)), columns=jnp.zeros((1, w.shape[1])))
        return dict(u=wide(first), v=thin, a=wide(second), b=thin, **ends)

    def parts(theta, w):
        """The changed weight, its scores, and the mask of the best."""
        values = w.astype(jnp.float32) + theta["u"] @ theta["v"]
        learned = theta["a"] @ theta["b"] + theta["rows"] + theta["columns"]
        score = jnp.abs(values) + share * learned
        best = jnp.argsort(-score.ravel())[: pattern.kept(*w.shape)]
        mask = jnp.zeros(w.size, bool).at[best].set(True).reshape(w.shape)
        return values, score, mask

    def soft(theta, w):
        values, score, mask = parts(theta, w)
        return values * straight_through(mask.astype(jnp.float32), score)

    def render(theta, w):
        values, _, mask = parts(theta, w)
        return pattern.pack(jnp.where(mask, values, 0.0), mask, w.dtype)

    return Parametrization(start, soft, render)
