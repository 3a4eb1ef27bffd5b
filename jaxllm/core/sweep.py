"""The sweep of optimal brain surgeon over a weight's inputs (GPTQ, algorithm 1).

The names are those of arXiv:2210.17323 with W and Q as [in, out]: U is the upper
Cholesky factor of H^-1, E holds the errors of one batch of inputs, which reach the
inputs beyond the batch only at its end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim, fori_loop
from jaxtyping import Array, Bool, Float, Int

from jaxllm.core.patterns import Pattern

BATCH = 128  # inputs whose errors are kept back and applied together


class Problem(NamedTuple):
    """A weight and what its sweep reads, inputs in the order of the sweep.

    ``order`` has each input's own index; that of a filling row is no input's.
    ``params`` are the target's parameters of all blocks: per input for a pattern (its
    mask), per block for a grid.
    """

    w: Float[Array, "n out"]
    u: Float[Array, "n n"]
    allowed: Bool[Array, "n out"]
    order: Int[Array, "n"]
    params: Any


def upper_factor(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """U, upper triangular, with H^-1 = UT U, from one Cholesky factor of flipped H."""
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    eye = jnp.eye(len(h), dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]


def sweep(target, problem: Problem, block: int | None):
    """Q and the parameters; each ``block`` inputs are fitted when they are reached.

    Without ``block`` the parameters stay as given.
    """
    count = len(problem.w)
    batch = _batch_size(count, block)
    w, u, allowed, order, params = _filled(problem, -count % batch)

    def one_batch(b, state):
        w, params = state
        start = b * batch
        here = lambda x: dynamic_slice_in_dim(x, start, batch, 0)  # noqa: E731
        rows = here(u)
        triangle = dynamic_slice_in_dim(rows, start, batch, 1)
        part = Problem(here(w), triangle, here(allowed), here(order), params)
        q, e, params = _one_batch(target, part, block, count)
        beyond = jnp.where((jnp.arange(len(u)) >= start + batch)[None], rows, 0.0)
        return dynamic_update_slice_in_dim(w - beyond.T @ e, q, start, 0), params

    q, params = fori_loop(0, len(w) // batch, one_batch, (w, params))
    trim = lambda new, old: new[: len(old)]  # noqa: E731
    return q[:count], jax.tree.map(trim, params, problem.params)


def _batch_size(count: int, block: int | None) -> int:
    """About ``BATCH`` inputs, in whole blocks."""
    if block is None:
        return min(BATCH, count)
    return min(max(BATCH // block, 1), -(-count // block)) * block


def _filled(problem: Problem, short: int) -> Problem:
    """With ``short`` more inputs, which are zero and touch nothing."""
    count = len(problem.w)
    rows = lambda x, mode: jnp.pad(  # noqa: E731
        x, ((0, short), *[(0, 0)] * (x.ndim - 1)), mode=mode
    )
    unit = jnp.where(jnp.arange(count + short) < count, 0.0, 1.0)
    filling = jnp.arange(count, count + short, dtype=problem.order.dtype)
    return Problem(
        w=rows(problem.w, "constant"),
        u=jnp.pad(problem.u, ((0, short), (0, short))) + jnp.diag(unit),
        allowed=rows(problem.allowed, "constant"),
        order=jnp.concatenate((problem.order, filling)),
        params=jax.tree.map(lambda p: rows(p, "edge"), problem.params),
    )


def _one_batch(target, part: Problem, block: int | None, count: int):
    """Q, E and the parameters after one batch; the weight has ``count`` inputs."""
    shared = 1 if isinstance(target, Pattern) else min(target.block or count, count)
    slot = part.order // shared
    state = part.w, jnp.zeros_like(part.w)
    if block is None:
        q, e = _inputs(target, part, slot, 0, len(slot), state)
        return q, e, part.params

    def one_block(b, state):
        w, e, params = state
        fitted = _fit(target, part._replace(w=w), b * block, block, count)
        params = _stored(params, fitted, slot[b * block])
        now = part._replace(params=params)
        q, e = _inputs(target, now, slot, b * block, (b + 1) * block, (w, e))
        return q, e, params

    return fori_loop(0, len(slot) // block, one_block, (*state, part.params))


def _fit(target, part: Problem, low, block: int, count: int):
    """Parameters of the block that begins at ``low``, from its current rows."""
    here = lambda x: dynamic_slice_in_dim(x, low, block, 0)  # noqa: E731
    if isinstance(target, Pattern):
        cost = 1 / here(jnp.diagonal(part.u)) ** 2
        cost = jnp.where(here(part.order) < count, cost, target.filling)
    else:
        cost = jnp.ones(block)
    return target.fit(here(part.w), cost, here(part.allowed))


def _stored(params, fitted, at):
    """All parameters with those of one block from slot ``at`` on."""

    def store(old, new):
        return dynamic_update_slice_in_dim(old, new.reshape(-1, *old.shape[1:]), at, 0)

    return jax.tree.map(store, params, fitted)


def _inputs(target, part: Problem, slot, low, high, state):
    """W (becoming Q) and E after the batch's inputs from ``low`` to ``high``.

    q = snap(w_i), E_i = (w_i - q) / U_ii, and w_j -= U_ij E_i for all later j.
    """

    def one_input(i, state):
        w, e = state
        mine = jax.tree.map(lambda p: p[slot[i]], part.params)
        q = jnp.where(part.allowed[i], target.snap(w[i], mine), 0.0)
        error = (w[i] - q) / part.u[i, i]
        later = jnp.where(jnp.arange(len(w)) > i, part.u[i], 0.0)
        w = (w - later[:, None] * error[None]).at[i].set(q)
        return w, e.at[i].set(error)

    return fori_loop(low, high, one_input, state)
