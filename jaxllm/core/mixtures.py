"""Grids whose blocks run along the outputs, or whose bits differ between blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import metrics
from jaxllm.core.exempt import Exempt
from jaxllm.core.formats import Integer
from jaxllm.core.scales import Grid, fit_all, group_of, per_entry
from jaxllm.core.spec import expression
from jaxllm.core.splits import kept_apart
from jaxllm.core.sweep import Problem, sweep, upper_factor
from jaxllm.core.weights import RowGroups, Sum, Transposed, materialize


@dataclasses.dataclass(frozen=True)
class AcrossOutputs:
    """A grid whose blocks are outputs of one input (per-IC quantization).

    ``grid.block`` outputs share a scale, so that a strong input keeps its rounding
    error to itself.
    """

    grid: Grid

    block = 1
    filling = 0.0

    def fit(self, block, importance, support=None):
        """Parameters of one input [1, out], spread over the outputs: [out] each."""
        line, allowed = block.T, None if support is None else support.T
        found = fit_all(self.grid, line, jnp.ones(len(line)), allowed)
        return jax.tree.map(lambda p: p[group_of(self.grid, len(line)), 0], found)

    def snap(self, values, params):
        return self.grid.snap(values, params)

    def pack(self, values, params, support, dtype) -> Transposed:
        """The stored weight; ``params`` are [in, out]."""
        step = min(self.grid.block or values.shape[1], values.shape[1])
        mine = jax.tree.map(lambda p: p[:, ::step].T, params)
        return Transposed(self.grid.pack(values.T, mine, support, dtype))


@expression
def mixed_blocks(
    bits: int,
    block: int,
    share: float,
    rule,
    metric=metrics.gram(),
    salience=metrics.pivots(),
):
    """Blocks of inputs in bits - 1, bits or bits + 1, by salience, rounded as by obs.

    The salience of a block is the mean of w^2 importance over its weights; the
    highest ``share`` of blocks gets a bit more, as many of the lowest a bit less, so
    that the mean stays. Parameters are fitted before the sweep, by the importance.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"share {share}; accepted: 0 to 0.5")
    kinds = ((bits + 1, share), (bits, 1 - 2 * share), (bits - 1, share))
    return ranked_blocks(kinds, block, rule, metric, salience).call


@expression
def energy():
    """The mean of w^2 importance over the weights of a block [n, out]."""
    return lambda w, importance: (w**2 * importance[:, None]).mean()


@expression
def spread():
    """Mean importance times the mean squared range, max w - min w, of a block."""

    def score(w, importance):
        return importance.mean() * ((w.max(0) - w.min(0)) ** 2).mean()

    return score


@expression
def ranked_blocks(
    kinds,
    block: int,
    rule,
    metric=metrics.gram(),
    salience=metrics.pivots(),
    rank=energy(),
    apart: float = 0.0,
):
    """Blocks of inputs in several bit widths, by rank, rounded as by obs.

    ``kinds`` are (bits, share of the blocks), for the highest rank first; the second
    takes what is left of one. ``rank(w, importance)`` scores a block. A share
    ``apart`` of all weights, those of largest |w| sqrt(importance) in blocks of the
    fewest bits, is stored beside them. Parameters are fitted before the sweep.
    """
    shares = [share for _, share in kinds]
    if min(shares) < 0 or sum(shares) > 1 + 1e-6 or not 0 <= apart < 1:
        raise ValueError(f"shares {shares}, apart {apart}; accepted: 0 to 1 together")
    grids = [Grid(Integer(b), block, rule) for b, _ in kinds]
    fewest = min(range(len(kinds)), key=lambda i: kinds[i][0])

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("blocks of mixed bits do not keep a sparse support")
        dense, importance = w.astype(jnp.float32), salience(stats, len(w)).importance
        order = _ranked(rank, dense, importance, block)
        counts = [int(len(order) * share) for share in shares]
        counts[1] += len(order) - sum(counts)
        names = jnp.asarray(np.repeat(np.arange(len(kinds)), counts))
        kind = jnp.zeros(len(order), jnp.int32).at[order].set(names)
        low = kind[jnp.arange(len(w)) // block] == fewest
        count = int(apart * w.size)
        free = _largest(dense, jnp.where(low, importance, 0.0), count)
        params = [_fitted(g, dense, importance, free) for g in grids]
        q = _swept(grids, dense, metric(stats, len(w)), params, kind, free)
        base = jnp.where(free, 0.0, q)
        main = _stored(grids, base, params, order, counts, w.dtype)
        if not count:
            return main
        rest = (q - materialize(main).astype(jnp.float32)).astype(jnp.bfloat16)
        return Sum((main, kept_apart(rest, free.astype(jnp.float32), count)))

    return solve


def _ranked(rank, w, importance, block: int):
    """Blocks of inputs by falling rank; a short last one is filled with zeros."""
    short = -len(w) % block
    blocks = jnp.pad(w, ((0, short), (0, 0))).reshape(-1, block, w.shape[1])
    shares = jnp.pad(importance, (0, short)).reshape(-1, block)
    return jnp.argsort(-jax.vmap(rank.call)(blocks, shares), stable=True)


def _largest(w, importance, count: int):
    """A mask of the ``count`` weights of largest |w| sqrt(importance)."""
    score = (jnp.abs(w) * jnp.sqrt(importance)[:, None]).ravel()
    mask = jnp.zeros(w.size, bool).at[jnp.argsort(-score)[:count]].set(True)
    return mask.reshape(w.shape)


def _fitted(grid: Grid, w, importance, free):
    """Parameters of all blocks, as if the free weights were zero and did not count."""
    share = per_entry(importance) * jnp.where(free, 0.0, 1.0)
    return fit_all(grid, jnp.where(free, 0.0, w), share, None)


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """Several grids; parameters are (theirs ..., the grid that each input uses)."""

    grids: tuple[Grid, ...]

    def snap(self, values, params):
        *each, kind = params
        found = [g.snap(values, p) for g, p in zip(self.grids, each, strict=True)]
        return jnp.select([kind == i for i in range(len(found))], found)


def _swept(grids, w, found: metrics.Metric, params, kind, free):
    owner = jnp.arange(len(w)) // grids[0].block
    mine = [jax.tree.map(lambda p: p[owner], p) for p in params]
    each = jnp.broadcast_to(kind[owner][:, None], w.shape)
    target = Exempt(_OneOf(tuple(grids)))
    allowed, order = jnp.ones(w.shape, bool), jnp.arange(len(w))
    state = ((*mine, each), free)
    return sweep(
        target, Problem(w, upper_factor(found.full()), allowed, order, state), None
    )[0]


def _stored(grids, q, params, order, counts, dtype) -> RowGroups:
    block, out = grids[0].block, q.shape[1]
    short = len(order) * block - len(q)
    rows = jnp.pad(q, ((0, short), (0, 0))).reshape(-1, block, out)
    parts, start = [], 0
    for grid, own, count in zip(grids, params, counts, strict=True):
        if count:
            mine = order[start : start + count]
            values = rows[mine].reshape(-1, out)
            chosen = jax.tree.map(lambda p, mine=mine: p[mine], own)
            parts.append(grid.pack(values, chosen, None, dtype))
        start += count
    small = np.min_scalar_type(max(len(order) - 1, 1))
    return RowGroups(order.astype(small), tuple(parts), block, len(q))
