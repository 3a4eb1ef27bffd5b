"""Solving all but a few weights, which are kept apart in a better format."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.scales import fit_all, group_of, per_entry
from jaxllm.core.solvers import nearest
from jaxllm.core.spec import expression
from jaxllm.core.splits import kept_apart
from jaxllm.core.sweep import Problem, sweep, upper_factor
from jaxllm.core.weights import Sparse, Sum, materialize


@dataclasses.dataclass(frozen=True)
class Exempt:
    """A set whose points are those of ``inner``, and anything where ``free``.

    Parameters are (those of ``inner``, free [..., out]), one row per input.
    """

    inner: Any

    block = 1

    def snap(self, values, params):
        mine, free = params
        return jnp.where(free, values, self.inner.snap(values, mine))


@expression
def exempting(
    target, split, metric=metrics.gram(), compensate=True, rare=None, fitting=None
):
    """The weights that ``split`` takes stay free, the others go to ``target``.

    Parameters are fitted without the free weights, under the metric ``fitting``
    (None: ``metric``). ``compensate`` sweeps as ``obs``
    does: free weights have no error of their own and absorb that of earlier inputs.
    What is kept apart is the free value less what the main part has there; ``rare``
    rounds it again, each weight to the nearest.
    """

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("weights kept apart beside a sparse support")
        kept = split(w, stats, key)
        free = materialize(kept) != 0
        found = metric(stats, len(w))
        fit = (fitting or metric)(stats, len(w)).importance
        dense = w.astype(jnp.float32)
        share = per_entry(fit) * jnp.where(free, 0.0, 1.0)
        params = fit_all(target, jnp.where(free, 0.0, dense), share, ~free)
        q = _rounded(target, params, dense, free, found, compensate)
        main = target.pack(jnp.where(free, 0.0, q), params, None, w.dtype)
        rest = (q - materialize(main).astype(jnp.float32)).astype(kept.dtype)
        return Sum((main, _kept(rest, free, kept, rare)))

    return solve


def _rounded(target, params, w, free, found: metrics.Metric, compensate: bool):
    """Q, exact where free, with the ``params`` of all blocks."""
    mine = jax.tree.map(lambda p: p[group_of(target, len(w))], params), free
    if not compensate:
        return Exempt(target).snap(w, mine)
    allowed, order = jnp.ones(w.shape, bool), jnp.arange(len(w))
    problem = Problem(w, upper_factor(found.full()), allowed, order, mine)
    return sweep(Exempt(target), problem, None)[0]


def _kept(rest, free, like, rare):
    """The free entries of ``rest``, in the form of ``like``, rounded by ``rare``."""
    if rare is None:
        count = like.values.size
        return kept_apart(rest, jnp.where(free, 1.0, 0.0), count)
    count = like.values.size
    sparse = Sparse.of(rest.astype(jnp.float32), free, count, "mask")
    grid = nearest(rare)
    return sparse.refine(lambda w, stats, support: grid(w, stats, None, support), None)
