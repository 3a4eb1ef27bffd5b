"""Residual stacks: a weight as a sum of blocks, each of what the former left."""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.solvers import resolve_rank
from jaxllm.core.spec import expression
from jaxllm.core.weights import Signed, Sum


@expression
def signed_stack(
    blocks: int, rank: int = 16, metric=metrics.diagonal(), dtype: str = "bfloat16"
):
    """``blocks`` times: R = sign(R) * |R|, |R| by truncated SVD, R the rest.

    Rows are scaled by the root of their importance while they are decomposed
    (BitStack, arXiv:2410.23918, section 2.2). Fewer of the first terms are a smaller
    model.
    """
    if blocks < 1:
        raise ValueError(f"blocks {blocks}; accepted: at least 1")

    def solve(w, stats, key=None, support=None) -> Sum:
        if support is not None:
            raise TypeError("a signed product cannot keep a sparse support")
        keep = resolve_rank(w.shape, rank, None)
        importance = jnp.maximum(metric(stats, len(w)).importance, 1e-12)
        scale = jnp.sqrt(importance / importance.mean())[:, None]
        rest, terms = w.astype(jnp.float32), []
        for _ in range(blocks):
            u, s, vt = jnp.linalg.svd(jnp.abs(rest * scale), full_matrices=False)
            half = jnp.sqrt(s[:keep])
            first = (u[:, :keep] * half[None]) / scale
            second = half[:, None] * vt[:keep]
            kept = first.astype(dtype), second.astype(dtype)
            terms.append(Signed.of(rest < 0, *kept, w.dtype))
            rest = rest - terms[-1].materialize().astype(jnp.float32)
        return Sum(tuple(terms))

    return solve
