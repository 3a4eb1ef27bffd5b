"""Splits keep a part of a weight apart before solving; corrections mend the rest.

Both are called as ``part(w, stats, key)`` with a dense matrix [in, out] and give
a weight: a split of the weight itself, a correction of what the solver left.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core import metrics
from jaxllm.core.scales import per_entry
from jaxllm.core.solvers import factorize, resolve_rank
from jaxllm.core.spec import expression
from jaxllm.core.weights import LowRank, Scattered, Segmented, Sparse, Trainable


@expression
def low_rank(rank: int = 8, metric=metrics.gram(), dtype: str = "bfloat16"):
    """The best rank-r term in a metric, stored in ``dtype``.

    As a correction of a rounding error with the identity metric this is LoRC
    (ZeroQuant-V2), with a diagonal one LQER (arXiv:2402.02446).
    """
    if rank < 1:
        raise ValueError(f"rank {rank}; accepted: at least 1")

    def part(w, stats, key=None) -> LowRank:
        keep = resolve_rank(w.shape, rank, None)
        found = factorize(w.astype(jnp.float32), metric(stats, len(w)), keep)
        cast = lambda x: x.astype(dtype)  # noqa: E731
        return dataclasses.replace(
            found, first=cast(found.first), second=cast(found.second)
        )

    return part


@expression
def outliers(
    fraction: float = 0.01, metric=metrics.diagonal(), dtype: str = "bfloat16"
):
    """The weights of largest |w| sqrt(importance), kept apart in ``dtype``.

    Stored as a list of places, in segments or as a bit mask (``kept_apart``).
    """
    count_of = _counted(fraction)

    def part(w, stats, key=None) -> Scattered | Segmented | Sparse:
        size = jnp.abs(w).astype(jnp.float32)
        score = size * jnp.sqrt(per_entry(metric(stats, len(w)).importance))
        return kept_apart(w.astype(dtype), score, count_of(w))

    return part


@expression
def sensitive(
    fraction: float = 0.01, target=None, metric=metrics.pivots(), dtype="bfloat16"
):
    """The weights whose leaving lowers the rounding error of their group most (SpQR).

    With E(g) the error of group g on a grid of its own, sum importance (w - q)^2,
    weight i has the score E(g) - E(g without i) (arXiv:2306.03078, section 4 and the
    authors' code); they take scores above a threshold, here it is a fixed share.
    """
    count_of = _counted(fraction)

    def part(w, stats, key=None) -> Scattered | Segmented | Sparse:
        if target is None:
            raise ValueError("sensitive needs the grid that the rest is rounded on")
        cost = metric(stats, len(w)).importance
        score = left_out_gain(target, w.astype(jnp.float32), cost)
        return kept_apart(w.astype(dtype), score, count_of(w))

    return part


def left_out_gain(target, w: Float[Array, "in out"], cost: Float[Array, "in"]):
    """E(g) - E(g without i) for every weight, [in, out]."""
    count, out = w.shape
    block = min(target.block or count, count)
    short = -count % block
    blocks = jnp.pad(w, ((0, short), (0, 0))).reshape(-1, block, out)
    costs = jnp.pad(cost, (0, short)).reshape(-1, block)

    def error(block, cost):
        params = target.fit(block, cost)
        here = jax.tree.map(lambda p: p[None], params)
        return (cost[:, None] * (block - target.snap(block, here)) ** 2).sum(0)

    def gains(block, cost):
        def without(i):  # a zero takes no part in the range, nor in the error
            return error(block.at[i].set(0.0), cost.at[i].set(0.0))

        return error(block, cost)[None] - jax.lax.map(without, jnp.arange(len(block)))

    return jax.vmap(gains)(blocks, costs).reshape(-1, out)[:count]


def kept_apart(
    w, score: Float[Array, "in out"], count: int
) -> Scattered | Segmented | Sparse:
    """The ``count`` entries of highest score, as a list, as segments or as a bit mask.

    The smallest of the three; segments, which a kernel reads, may be three fifths
    larger than the list: of a packed weight with half a percent apart that is 3 %.
    """
    flat = jnp.zeros(w.size, bool).at[jnp.argsort(-score.ravel())[:count]].set(True)
    chosen, itemsize = flat.reshape(w.shape), w.dtype.itemsize
    listed = Scattered.size(w.shape, count, itemsize)
    masked = -(-len(w) // 8) * w.shape[1] + count * itemsize
    if Segmented.size(w.shape, count, itemsize) <= min(1.6 * listed, masked):
        return Segmented.of(w, chosen, count)
    if listed <= masked:
        return Scattered.of(w, chosen, count)
    return Sparse.of(w, chosen, count, "mask")


def _counted(fraction: float):
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}; accepted: 0 < fraction < 1")
    return lambda w: max(1, int(fraction * w.size))


@expression
def adapter(rank: int = 8, alpha: float = 16.0, rank_stabilized: bool = False):
    """A low-rank term that training may change, zero at the start (LoRA).

    W + (alpha / r) A B with A ~ uniform(-1, 1) / sqrt(in), B = 0 (arXiv:2106.09685,
    section 4.1, with the initialisation of the authors' code); ``rank_stabilized``
    uses alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank {rank}, alpha {alpha}; accepted: rank >= 1, alpha > 0")

    def part(w, stats, key) -> Trainable:
        resolve_rank(w.shape, rank, None)
        gain = alpha / (rank**0.5 if rank_stabilized else rank)
        first, second = adapter_factors(key, w.shape, rank, w.dtype)
        return Trainable(LowRank(first, second, gain))

    return part


def adapter_factors(
    key, shape: tuple[int, ...], rank: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """A ~ uniform(-1, 1) / sqrt(in) [..., in, rank] and B = 0 [..., rank, out]."""
    *lead, rows, out = shape
    bound = rows**-0.5
    first = jax.random.uniform(key, (*lead, rows, rank), dtype, -bound, bound)
    return first, jnp.zeros((*lead, rank, out), dtype)


@expression
def trainable(part=low_rank()):
    """Another part that training may change afterwards, as it does an adapter."""
    return lambda w, stats, key=None: Trainable(part(w, stats, key))


@expression
def trained_only(solve, *fields: str):
    """Another solver, of whose weights training may change these fields afterwards."""

    def run(w, stats, key=None, support=None) -> Trainable:
        made = solve(w, stats, key, support)
        missing = [name for name in fields if not hasattr(made, name)]
        if missing or not fields:
            raise ValueError(f"a {type(made).__name__} has no {missing or 'fields'}")
        return Trainable(made, fields)

    return run
