"""Splits keep a part of a weight apart before solving; corrections mend the rest.

Both are called as ``part(w, stats, key)`` with a dense matrix [in, out] and give
a weight: a split of the weight itself, a correction of what the solver left.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.solvers import factorize, resolve_rank
from jaxllm.core.spec import expression
from jaxllm.core.weights import LowRank, Sparse, Trainable


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
    """The weights of largest |w| sqrt(importance), kept sparse in ``dtype``."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}; accepted: 0 < fraction < 1")

    def part(w, stats, key=None) -> Sparse:
        score = jnp.abs(w) * jnp.sqrt(metric(stats, len(w)).importance)[:, None]
        count = max(1, int(fraction * w.size))
        flat = jnp.zeros(w.size, bool).at[jnp.argsort(-score.ravel())[:count]].set(True)
        return Sparse.of(w.astype(dtype), flat.reshape(w.shape), count, "mask")

    return part


@expression
def adapter(rank: int = 8, alpha: float = 16.0, rank_stabilized: bool = False):
    """A low-rank term that training may change, zero at the start (LoRA).

    W + (alpha / r) A B with A ~ uniform(-1, 1) sqrt(3 / in), B = 0 (arXiv:2106.09685,
    section 4.1, with the initialisation of the authors' code); ``rank_stabilized``
    uses alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank {rank}, alpha {alpha}; accepted: rank >= 1, alpha > 0")

    def part(w, stats, key) -> Trainable:
        rows, out = w.shape
        resolve_rank(w.shape, rank, None)
        bound = (3.0 / rows) ** 0.5
        first = jax.random.uniform(key, (rows, rank), w.dtype, -bound, bound)
        gain = alpha / (rank**0.5 if rank_stabilized else rank)
        return Trainable(LowRank(first, jnp.zeros((rank, out), w.dtype), gain))

    return part
