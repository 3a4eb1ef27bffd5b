"""Solvers: the point of a set that is closest to a weight under a metric.

A solver is called as ``solve(w, stats, key, support) -> weight`` for w [in, out];
``support`` (bool [in, out] or None) marks the entries that may be non-zero. A set is
a ``Grid`` or a ``Pattern``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core import metrics
from jaxllm.core.patterns import Pattern
from jaxllm.core.scales import fit_all, group_of
from jaxllm.core.spec import expression
from jaxllm.core.weights import LowRank

PANEL = 128


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
        found = metric(stats, len(w))
        return _obs(target, w, found.full(), found.importance, order, support)

    return solve


def _obs(target, w, h, importance, order, support):
    count = len(w)
    block = min(target.block or count, count)
    dense = jnp.where((importance > 0)[:, None], w.astype(jnp.float32), 0.0)
    if support is None:
        allowed = jnp.ones(dense.shape, bool)
    else:
        dense, allowed = jnp.where(support, dense, 0.0), support
    static = order == "activation" or block == count
    turn = jnp.argsort(-importance, stable=True) if order == "activation" else None
    groups = group_of(target, count)
    params = _first_params(target, dense, importance, support)
    if turn is not None:
        dense, allowed, groups = dense[turn], allowed[turn], groups[turn]
        h = h[turn][:, turn]
    u = upper_factor(h)
    if isinstance(target, Pattern) and static:
        params = target.fit(dense, 1 / jnp.diagonal(u) ** 2, support)
    plan = _Plan(target, block, static, groups)
    values, params = _sweep(plan, dense, u, params, allowed)
    if turn is not None:
        values = jnp.zeros_like(values).at[turn].set(values)
    mine = _per_input(target, params, count)
    return _packed(target, values, params, mine, support, w.dtype)


class _Plan:
    """What the sweep needs to know of a set: its blocks and when they are fitted."""

    def __init__(self, target, block: int, static: bool, groups):
        self.set, self.block, self.static, self.groups = target, block, static, groups
        self.pattern = isinstance(target, Pattern)
        self.panel = block if block > PANEL else PANEL // block * block

    def fit(self, rows, cost, allowed, real):
        """Parameters of a block from its current rows; filling rows do not count."""
        if not self.pattern:
            return self.set.fit(rows, jnp.ones(len(rows)), allowed)
        return self.set.fit(rows, jnp.where(real, cost, -1.0), allowed)

    def of(self, params, i):
        """Parameters of input ``i`` among all."""
        at = i if self.pattern else self.groups[i]
        return jax.tree.map(lambda p: p[at], params)

    def store(self, params, start, fitted):
        if self.pattern:
            return jax.lax.dynamic_update_slice_in_dim(params, fitted, start, 0)
        at = start // self.block
        return jax.tree.map(lambda p, f: p.at[at].set(f), params, fitted)


def _sweep(plan: _Plan, dense, u, params, allowed):
    """All inputs in order, panel by panel; errors go on lazily (GPTQ, algorithm 1)."""
    count, panel = (
        len(dense),
        min(plan.panel, -(-len(dense) // plan.block) * plan.block),
    )
    if plan.static:
        panel = min(PANEL, count)
    short = -count % panel
    rows = lambda x: jnp.pad(x, ((0, short), (0, 0)))  # noqa: E731
    w, allowed = rows(dense), rows(allowed)
    u = jnp.pad(u, ((0, short), (0, short))) + jnp.diag(
        jnp.where(jnp.arange(count + short) < count, 0.0, 1.0)
    )
    plan.groups = jnp.pad(plan.groups, (0, short), mode="edge")
    params = rows(params) if plan.pattern else params
    index = jnp.arange(count + short)
    step = panel if plan.static else plan.block

    def one_panel(p, state):
        w, params = state
        start = p * panel
        here = lambda x: jax.lax.dynamic_slice_in_dim(x, start, panel, 0)  # noqa: E731
        triangle = jax.lax.dynamic_slice(u, (start, start), (panel, panel))
        free = here(allowed)

        def one_block(b, state):
            part, errors, params = state
            low = b * step
            if not plan.static:
                cut = lambda x: jax.lax.dynamic_slice_in_dim(x, low, step, 0)  # noqa: E731
                cost = 1 / cut(jnp.diagonal(triangle)) ** 2
                fitted = plan.fit(
                    cut(part), cost, cut(free), start + low + jnp.arange(step) < count
                )
                params = plan.store(params, start + low, fitted)

            def one_input(j, state):
                part, errors = state
                i = low + j
                row, line = part[i], triangle[i]
                q = plan.set.snap(row, plan.of(params, start + i))
                q = jnp.where(free[i], q, 0.0)
                error = (row - q) / line[i]
                later = jnp.where(jnp.arange(panel) > i, line, 0.0)
                part = (part - later[:, None] * error[None]).at[i].set(q)
                return part, errors.at[i].set(error)

            part, errors = jax.lax.fori_loop(0, step, one_input, (part, errors))
            return part, errors, params

        blank = jnp.zeros((panel, w.shape[1]))
        state = here(w), blank, params
        part, errors, params = jax.lax.fori_loop(0, panel // step, one_block, state)
        beyond = jnp.where(index >= start + panel, here(u), 0.0)
        w = w - beyond.T @ errors
        return jax.lax.dynamic_update_slice_in_dim(w, part, start, 0), params

    w, params = jax.lax.fori_loop(0, len(w) // panel, one_panel, (w, params))
    return w[:count], params[:count] if plan.pattern else params


def upper_factor(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """U, upper triangular, with H^-1 = UT U, from one Cholesky factor of flipped H."""
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    eye = jnp.eye(len(h), dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]


@expression
def svd(rank: int | None = None, ratio: float | None = None, metric=metrics.identity()):
    """Truncated SVD in a metric: the best V of rank r under |F (W - V)|, FT F = matrix.

    F W = U S VT; V = F^-1 U_r S_r VrT. ``ratio`` gives the rank instead, as the
    share of the dense parameters that both factors hold together.
    """
    if (rank is None) == (ratio is None):
        raise ValueError("svd takes either rank or ratio")

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
        if not 0 < ratio <= 1:
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
    first, second = back(u[:, :rank] * half), half[:, None] * vt[:rank]
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
