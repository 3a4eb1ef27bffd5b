"""Grids whose blocks run along the outputs, or whose bits differ between blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import metrics
from jaxllm.core.exempt import Exempt
from jaxllm.core.formats import Integer
from jaxllm.core.scales import Grid, fit_all, group_of
from jaxllm.core.spec import expression
from jaxllm.core.sweep import Problem, sweep, upper_factor
from jaxllm.core.weights import RowGroups, Transposed


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
        line = jnp.swapaxes(block, 0, 1)
        found = fit_all(self.grid, line, jnp.ones(len(line)), support)
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
    grids = [Grid(Integer(b), block, rule) for b in (bits + 1, bits, bits - 1)]

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("blocks of mixed bits do not keep a sparse support")
        dense = w.astype(jnp.float32)
        importance = salience(stats, len(w)).importance
        blocks = -(-len(w) // block)
        order = _by_salience(dense**2 * importance[:, None], block, blocks)
        few = int(blocks * share)
        counts = (few, blocks - 2 * few, few)
        kinds = jnp.asarray(np.repeat(np.arange(3), counts))
        kind = jnp.zeros(blocks, jnp.int32).at[order].set(kinds)
        params = [fit_all(g, dense, importance, None) for g in grids]
        q = _swept(grids, dense, metric(stats, len(w)), params, kind, block)
        return _stored(grids, q, params, order, counts, w.dtype)

    return solve


def _by_salience(salience, block: int, blocks: int):
    """Blocks of inputs by falling mean salience of their weights."""
    owner = jnp.arange(len(salience)) // block
    total = jax.ops.segment_sum(salience.mean(1), owner, blocks)
    size = jax.ops.segment_sum(jnp.ones(len(salience)), owner, blocks)
    return jnp.argsort(-total / size, stable=True)


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """Several grids; parameters are (theirs ..., the grid that each input uses)."""

    grids: tuple[Grid, ...]

    def snap(self, values, params):
        *each, kind = params
        found = [g.snap(values, p) for g, p in zip(self.grids, each, strict=True)]
        return jnp.select([kind == i for i in range(len(found))], found)


def _swept(grids, w, found: metrics.Metric, params, kind, block: int):
    owner = jnp.arange(len(w)) // block
    mine = [jax.tree.map(lambda p: p[owner], p) for p in params]
    each = jnp.broadcast_to(kind[owner][:, None], w.shape)
    free = jnp.zeros(w.shape, bool)
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
