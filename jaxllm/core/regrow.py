"""Prune and grow: exchange entries of a sparse mask without touching any value."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.core import metrics
from jaxllm.core.patterns import Pattern
from jaxllm.core.scales import fit_all
from jaxllm.core.spec import expression

SMALL = 1e-12
THRESHOLD = 0.1 / 2048  # the authors' 0.1 is of the sum over 2,048 tokens


class _State(NamedTuple):
    """Masks [in, out] of what stays and of what was tried; the rest is per output."""

    mask: Bool[Array, "in out"]
    moved: Bool[Array, "in out"]
    error: Float[Array, "out"]
    active: Bool[Array, "out"]


@expression(needs=("moments",))
def regrow(
    pattern: Pattern,
    metric=metrics.diagonal(),
    cycles: int = 50,
    threshold: float = THRESHOLD,
    power: float = 1.0,
):
    """Exchange pruned for kept weights until an output's expected error is small.

    With c_i = w_i E[x_i], e = the sum of c over pruned inputs is the mean error of
    an output. Each cycle grows the pruned input of largest sign(e) c_i / Var(x_i)^power
    and prunes, among kept inputs whose c_j has the other sign, that of least
    |w_j| sqrt(E[x_j^2]) (for N:M, the least of the grown input's block). An output
    stops when |e| <= ``threshold`` or the exchange would change the sign of e; no
    input is moved twice (DSnoT, arXiv:2310.08915, eq. 3 to 6 and the authors' code).
    That code stops at a change of sign for N:M alone, and makes exchanges that raise
    |e|, which are left out here: where an output has 64 inputs these undo the mask.
    ``metric`` ranks the weights of the first mask.
    """
    if pattern.joint:
        raise ValueError("a joint pattern has no fixed count per output to exchange in")
    if cycles < 0 or threshold < 0:
        raise ValueError(f"cycles {cycles}, threshold {threshold}; accepted: >= 0")

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("the weight is sparse already; prune once")
        pattern.check(len(w))
        dense, moments = w.astype(jnp.float32), stats.moments
        masks = fit_all(pattern, dense, metric(stats, len(w)).importance, None)
        mask = masks.reshape(-1, w.shape[1])[: len(w)]
        score = jnp.abs(dense) * jnp.sqrt(moments.mean_square)[:, None]
        moves = dense * moments.mean[:, None]
        scatter = jnp.maximum(moments.variance, SMALL)[:, None] ** power
        found = _exchange(
            pattern, mask, moves, moves / scatter, score, cycles, threshold
        )
        return pattern.pack(jnp.where(found, dense, 0.0), found, w.dtype)

    return solve


def _exchange(pattern, mask, moves, gain, score, cycles, threshold):
    """The mask after all cycles; ``moves`` is c, ``gain`` what growing is ranked by."""
    rows = jnp.arange(len(mask))[:, None]
    start = jnp.where(mask, 0.0, moves).sum(0)
    block = pattern.block if pattern.structured else None

    def cycle(_, s: _State) -> _State:
        side = jnp.sign(s.error)[None]
        free = ~s.moved
        grown = jnp.where(~s.mask & free, side * gain, -jnp.inf).argmax(0)
        fits = side * moves < 0 if block is None else rows // block == grown // block
        cost = jnp.where(s.mask & free & fits, score, jnp.inf)
        gone, possible = cost.argmin(0), jnp.isfinite(cost.min(0))
        pick = lambda i: jnp.take_along_axis(moves, i[None], 0)[0]  # noqa: E731
        after = s.error + pick(gone) - pick(grown)
        same = jnp.sign(after) == jnp.sign(start)
        more = possible & (jnp.abs(s.error) > threshold) & same
        active = s.active & more & jnp.any(~s.mask & free, 0)
        grow, prune = (active[None] & (rows == i[None]) for i in (grown, gone))
        helps = active & (jnp.abs(after) < jnp.abs(s.error))
        mask = jnp.where(helps[None], (s.mask | grow) & ~prune, s.mask)
        error = jnp.where(helps, after, s.error)
        return _State(mask, s.moved | grow | prune, error, active)

    first = _State(mask, jnp.zeros_like(mask), start, jnp.ones(mask.shape[1], bool))
    return jax.lax.fori_loop(0, cycles, cycle, first).mask
