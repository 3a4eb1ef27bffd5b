"""Cyclic coordinate descent on a layer's output error (QuantEase)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.patterns import Pattern
from jaxllm.core.scales import fit_all, group_of
from jaxllm.core.spec import expression
from jaxllm.core.splits import kept_apart
from jaxllm.core.weights import Sum

RELAXED = 3  # every third sweep leaves the grid, as in the authors' code
POWER_STEPS = 30


@expression
def coordinates(target, metric=metrics.gram(), sweeps: int = 24, outliers: float = 0.0):
    """min tr((W - Q - S)T H (W - Q - S)) over Q on a grid, input after input, again.

    Each q_i = snap(q_i + [H (W - Q - S)]_i / H_ii) is the exact minimum over one
    input; one sweep in three is not rounded (arXiv:2309.01885, algorithm 1 and
    section 4); the best rounded sweep is kept. With ``outliers`` S keeps that share
    of entries, by iterative hard thresholding after each sweep: a gradient step of
    1 / (largest eigenvalue of H), then the largest magnitudes (algorithm 3).
    """
    if sweeps < 1 or not 0 <= outliers < 1:
        raise ValueError(f"sweeps {sweeps}, outliers {outliers}: >= 1, in 0..1")
    if isinstance(target, Pattern):
        raise TypeError("coordinate descent rounds on a grid; a pattern has no grid")

    def solve(w, stats, key=None, support=None):
        if support is not None and outliers:
            raise TypeError("outliers beside a sparse support are not supported")
        dense = w.astype(jnp.float32)
        if support is not None:
            dense = jnp.where(support, dense, 0.0)
        found = metric(stats, len(w))
        h, count = found.full(), int(outliers * w.size)
        s = _largest(dense, count)
        params = fit_all(target, dense - s, found.importance, support)
        mine = jax.tree.map(lambda p: p[group_of(target, len(w))], params)
        q, s = _descend(target, dense, h, mine, s, support, (sweeps, count))
        made = target.pack(q, params, support, w.dtype)
        if not count:
            return made
        exact = s.astype(jnp.bfloat16)
        return Sum((made, kept_apart(exact, jnp.abs(exact), count)))

    return solve


def _descend(target, w, h, mine, s, support, plan):
    """The best Q (rounded) and S over all sweeps."""
    sweeps, count = plan
    step = 1 / _largest_eigenvalue(h)

    def one(t, state):
        q, s, best, least = state
        relaxed = (t % RELAXED == 1) & (t < sweeps - 1)
        q, r = _sweep(target, w, h, mine, q, s, support, relaxed)
        loss = jnp.where(relaxed, jnp.inf, ((w - q - s) * r).sum())
        keep = lambda new, old: jnp.where(loss < least, new, old)  # noqa: E731
        best = jax.tree.map(keep, (q, s), best)
        if count:
            s = _largest(s + step * r, count)
        return q, s, best, jnp.minimum(loss, least)

    start = w - s
    state = start, s, (target.snap(start, mine), s), jnp.asarray(jnp.inf)
    return jax.lax.fori_loop(0, sweeps, one, state)[2]


def _sweep(target, w, h, mine, q, s, support, relaxed):
    """Q after one pass over the inputs, and R = H (W - Q - S)."""

    def one(i, state):
        q, r = state
        u = q[i] + r[i] / h[i, i]
        here = jax.tree.map(lambda p: p[i], mine)
        new = jnp.where(relaxed, u, target.snap(u, here))
        if support is not None:
            new = jnp.where(support[i], new, 0.0)
        r = r - h[:, i][:, None] * (new - q[i])[None]
        return q.at[i].set(new), r

    return jax.lax.fori_loop(0, len(w), one, (q, h @ (w - q - s)))


def _largest(w, count: int):
    """The ``count`` entries of largest magnitude, zero elsewhere."""
    if not count:
        return jnp.zeros_like(w)
    place = jax.lax.top_k(jnp.abs(w).ravel(), count)[1]
    flat = jnp.zeros(w.size, w.dtype).at[place].set(w.ravel()[place])
    return flat.reshape(w.shape)


def _largest_eigenvalue(h):
    """By power iteration from the diagonal, a little above the estimate."""
    turn = lambda _, v: (h @ v) / jnp.linalg.norm(h @ v)  # noqa: E731
    v = jax.lax.fori_loop(0, POWER_STEPS, turn, jnp.ones(len(h)) / len(h) ** 0.5)
    return 1.05 * jnp.linalg.norm(h @ v)
