"""Structured optimal brain surgeon: in which order units go, and what each costs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.core.allocate import allocate
from jaxllm.core.arrays import traced
from jaxllm.core.compose import Context
from jaxllm.core.model import Model
from jaxllm.core.spec import expression
from jaxllm.core.stats import output_energy
from jaxllm.core.units import Part, cut_and_mend, look, regression


@functools.partial(jax.jit, static_argnums=2)
def removal_order(
    w: Float[Array, "in out"], h: Float[Array, "in in"], units: int
) -> tuple[Int[Array, "steps"], Float[Array, "steps"]]:
    """Units in the order they go, and the output error when each is gone.

    With G = H^-1, removing the inputs S of a unit costs
    rho_S = tr(W_ST (G_SS)^-1 W_S); then W -= G_:S (G_SS)^-1 W_S and
    G -= G_:S (G_SS)^-1 G_S: (ZipLM, arXiv:2302.04089, eq. 3 and algorithm 1). The
    unit of least rho goes next; the last one stays.
    """
    run = len(w) // units
    inverse = jnp.linalg.inv(h)
    starts = jnp.arange(units) * run
    rows = starts[:, None] + jnp.arange(run)[None]

    def price(w, g, at):
        return (w[at] * jnp.linalg.solve(g[at][:, at], w[at])).sum()

    def step(state, _):
        w, g, alive = state
        safe = jnp.where(jnp.repeat(alive, run), 0.0, 1.0)
        costs = jax.vmap(price, (None, None, 0))(w, g + jnp.diag(safe), rows)
        gone = jnp.where(alive, costs, jnp.inf).argmin()
        at = rows[gone]
        pull = jnp.linalg.solve(g[at][:, at], jnp.concatenate((w[at], g[at]), 1))
        w = w - g[:, at] @ pull[:, : w.shape[1]]
        g = g - g[:, at] @ pull[:, w.shape[1] :]
        state = w.at[at].set(0.0), g.at[at].set(0.0).at[:, at].set(0.0), alive
        return (*state[:2], alive.at[gone].set(False)), (gone, costs[gone])

    first = w, inverse, jnp.ones(units, bool)
    _, (order, costs) = jax.lax.scan(step, first, length=units - 1)
    return order, jnp.cumsum(costs)


@expression
def prune_to_budget(speedup: float, cost, *, levels: int = 10, damping: float = 0.01):
    """The body that keeps, of each part, the number of units that a budget allows.

    Each part offers ``levels`` counts with the error of ``removal_order`` relative to
    tr(WT H W) and the cost of the table; an integer program takes the least total
    error at no more than 1 / ``speedup`` of the whole cost. What stays is refitted by
    regression. Where only shapes are known, each part keeps that share of its units.
    """
    if speedup < 1 or levels < 2:
        raise ValueError(f"speedup {speedup}, levels {levels}; accepted: >= 1, >= 2")

    def run(model: Model, context: Context) -> Model:
        parts = look(model, context, {"gram"})
        found = [_orders(part, damping) for part in parts]
        counts = [_counts(part.units.count, levels) for part in parts]
        if traced(found):
            chosen = [max(1, round(p.units.count / speedup)) for p in parts]
        else:
            losses = [_losses(e, c) for (_, e), c in zip(found, counts, strict=True)]
            costs = [cost(model, p, c) for p, c in zip(parts, counts, strict=True)]
            picked = allocate(losses, costs, sum(c[0] for c in costs) / speedup)
            chosen = [c[i] for c, i in zip(counts, picked, strict=True)]
        kept = {
            part.units.path: _left(order, part.units.count, keep)
            for part, (order, _), keep in zip(parts, found, chosen, strict=True)
        }
        return cut_and_mend(model, parts, kept, regression(damping))

    return run


def _orders(part: Part, damping: float):
    """The removal order and errors relative to the whole output."""
    h = part.stats.gram.mean
    h = h + (damping * jnp.diagonal(h).mean() + 1e-12) * jnp.eye(len(h))
    order, errors = removal_order(part.w, h, part.units.count)
    return order, errors / output_energy(h, part.w)


def _counts(units: int, levels: int) -> list[int]:
    """``levels`` numbers of units from all to one, without repetition of shapes."""
    steps = np.linspace(units, 1, levels).tolist()
    return [round(n) for n in steps]


def _losses(errors, counts: list[int]) -> list[float]:
    before = np.concatenate(([0.0], np.asarray(errors, np.float64)))
    return [float(before[counts[0] - n]) for n in counts]


def _left(order: Int[Array, "steps"], units: int, keep: int) -> Int[Array, "kept"]:
    """The units that are not among the first to go, sorted."""
    rank = jnp.full(units, units).at[order].set(jnp.arange(units - 1))
    return jnp.sort(jnp.argsort(-rank, stable=True)[:keep])
