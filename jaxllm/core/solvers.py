"""Solvers: the point of a set that is closest to a weight under a metric.

A solver is called as ``solve(w, stats, key, support) -> weight`` for w [in, out];
``support`` (bool [in, out] or None) marks the entries that may be non-zero. A set is
a ``Grid`` or a ``Pattern``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.patterns import Pattern
from jaxllm.core.scales import fit_all, group_of
from jaxllm.core.spec import expression
from jaxllm.core.sweep import Problem, sweep, upper_factor
from jaxllm.core.weights import LowRank


@expression
def nearest(target, metric=metrics.identity()):
    """Each weight on its own: rounding, or pruning by |w| sqrt(importance)."""

    def solve(w, stats, key=None, support=None):
        _check(target, w)
        dense = w.astype(jnp.float32)
        if support is not None:
            dense = jnp.where(support, dense, 0.0)
        importance = metric(stats, len(w)).importance
        params = fit_all(target, dense, importance, support)
        mine = _per_input(target, params, len(w))
        return _packed(target, target.snap(dense, mine), params, mine, support, w.dtype)

    return solve


@expression
def obs(target, metric=metrics.gram(), order: str = "given"):
    """Optimal brain surgeon, input by input: later inputs absorb each error.

    For input i (row of W), with H^-1 = UT U and U upper triangular:
    q_i = snap(w_i); w_j -= U_ij (w_i - q_i) / U_ii for all j > i. A grid gives GPTQ
    (arXiv:2210.17323), a pattern SparseGPT (arXiv:2301.00774), whose score is
    w_i^2 / U_ii^2. ``order`` "activation" takes inputs by falling H_ii, with the
    scales of all blocks fixed beforehand.
    """
    if order not in ("given", "activation"):
        raise ValueError(f"order {order!r}; accepted: 'given', 'activation'")
    if order == "activation" and isinstance(target, Pattern):
        raise ValueError("a pattern is fixed block by block: order must be 'given'")

    def solve(w, stats, key=None, support=None):
        _check(target, w)
        return _obs(target, w, metric(stats, len(w)), order, support)

    return solve


def _obs(target, w, found: metrics.Metric, order, support):
    count, h, importance = len(w), found.full(), found.importance
    dense = jnp.where((importance > 0)[:, None], w.astype(jnp.float32), 0.0)
    allowed = jnp.ones(dense.shape, bool) if support is None else support
    dense = jnp.where(allowed, dense, 0.0)
    params = _first_params(target, dense, importance, support)
    turn = jnp.arange(count)
    block = target.block if target.block and target.block < count else None
    block = None if getattr(target, "two_level", False) else block
    if order == "activation":
        turn, block = jnp.argsort(-importance, stable=True), None
        dense, allowed, h = dense[turn], allowed[turn], h[turn][:, turn]
    u = upper_factor(h)
    if found.drift is not None:
        dense, u = _drifting(dense, u, found.drift[turn][:, turn])
    if isinstance(target, Pattern) and block is None:
        params = target.fit(dense, 1 / jnp.diagonal(u) ** 2, support)
    q, params = sweep(target, Problem(dense, u, allowed, turn, params), block)
    values = jnp.zeros_like(q).at[turn].set(q)
    mine = _per_input(target, params, count)
    return _packed(target, values, params, mine, support, w.dtype)


def _drifting(w, u, drift):
    """W and U for the sweep that also mends the drift of the inputs.

    GPTAQ (arXiv:2504.02692, eq. 14) adds w_i P_ij to every later input j, with
    P = strictly_upper(D UT) U, D = E[(x~ - x) xT]. As w_i is the value of its turn,
    W = W_0 + PT W - strictly_lower(UT) E: solved for W, the sweep stays what it is.
    """
    p = jnp.triu(drift @ u.T, 1) @ u
    unit = jnp.eye(len(u)) - p.T
    solve = lambda x: jax.scipy.linalg.solve_triangular(  # noqa: E731
        unit, x, lower=True, unit_diagonal=True
    )
    later = solve(jnp.tril(u.T, -1)).T
    return solve(w), jnp.diag(jnp.diagonal(u)) + later


@expression
def svd(rank: int | None = None, ratio: float | None = None, metric=metrics.identity()):
    """Truncated SVD in a metric: the best V of rank r under |F (W - V)|, FT F = matrix.

    F W = U S VT; V = F^-1 U_r S_r VrT. ``ratio`` gives the rank instead, as the
    share of the dense parameters that both factors hold together.
    """
    if (rank is None) == (ratio is None):
        raise ValueError("svd takes either rank or ratio")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}; accepted: at least 1")

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("a low-rank product cannot keep a sparse support")
        keep = resolve_rank(w.shape, rank, ratio)
        found = metric(stats, len(w))
        return factorize(w, found, keep)

    return solve


def resolve_rank(shape: tuple[int, int], rank: int | None, ratio: float | None) -> int:
    """The rank, checked against the shape [in, out]."""
    if rank is None:
        if ratio is None or not 0 < ratio <= 1:
            raise ValueError(f"ratio {ratio}; accepted: 0 < ratio <= 1")
        rank = max(1, int(ratio * shape[0] * shape[1] / sum(shape)))
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank {rank} of a {shape} weight; accepted: 1 to {min(shape)}"
        )
    return rank


def factorize(w, metric: metrics.Metric, rank: int) -> LowRank:
    """The two factors of ``svd``, with the singular values shared between them."""
    dense = w.astype(jnp.float32)
    if metric.matrix is None:
        root = jnp.sqrt(jnp.maximum(metric.importance, 1e-12))
        u, s, vt = jnp.linalg.svd(root[:, None] * dense, full_matrices=False)
        back = lambda x: x / root[:, None]  # noqa: E731
    else:
        lower = jnp.linalg.cholesky(metric.matrix)
        u, s, vt = jnp.linalg.svd(lower.T @ dense, full_matrices=False)
        back = lambda x: jax.scipy.linalg.solve_triangular(  # noqa: E731
            lower, x, lower=True, trans="T"
        )
    half = jnp.sqrt(s[:rank])
    first, second = back(u[:, :rank] * half[None]), half[:, None] * vt[:rank]
    return LowRank(first.astype(w.dtype), second.astype(w.dtype))


def _check(target, w) -> None:
    if isinstance(target, Pattern):
        target.check(len(w))


def _first_params(target, dense, importance, support):
    """Parameters before the sweep: a grid's of all blocks, an empty mask."""
    if isinstance(target, Pattern):
        return jnp.zeros(dense.shape, bool)
    return fit_all(target, dense, importance, support)


def _masks(params, count: int):
    """Masks [blocks, n, out] as one [in, out]."""
    return params.reshape(-1, params.shape[-1])[:count]


def _per_input(target, params, count: int):
    """Parameters of each input [in, out] from those of each block."""
    if isinstance(target, Pattern):
        return _masks(params, count) if params.ndim == 3 else params
    groups = group_of(target, count)
    return jax.tree.map(lambda p: p[groups], params)


def _packed(target, values, params, mine, support, dtype):
    if isinstance(target, Pattern):
        if support is not None:
            raise TypeError("the weight is sparse already; prune once")
        return target.pack(values, mine, dtype)
    return target.pack(values, params, support, dtype)
