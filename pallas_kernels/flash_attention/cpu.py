"""Attention on a CPU: blocks of queries that fit a cache, each with its own keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.reference import (
    NEGATIVE,
    check,
    visibility,
)

BLOCK = 128  # queries whose scores are computed together
BLOCKS = 8  # at most, so that long sequences compile as fast


def flash_attention(
    q,
    k,
    v,
    segments=None,
    sinks=None,
    *,
    causal: bool = True,
    window: int | None = None,
    first: int = 0,
    soft_cap: float | None = None,
    scale: float | None = None,
    interpret: bool = False,
):
    """The reference's result; keys that no query of a block may see are not read.

    Plain JAX, as fast as XLA's code for it: shares are normalised after they have
    mixed the values, one pass over the scores less. Differentiable by itself.
    """
    del interpret  # nothing here is interpreted
    check(q, k, v, segments, sinks, window=window, first=first)
    heads, groups, ahead = q.shape[2], k.shape[2], k.shape[1] - q.shape[1]
    shared = q.reshape(*q.shape[:2], groups, heads // groups, q.shape[3])
    shared = shared.astype(jnp.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size = max(BLOCK, -(-q.shape[1] // BLOCKS))
    options = dict(causal=causal, window=window, first=first)
    mixed = []
    for low in range(0, q.shape[1], size):
        high = min(low + size, q.shape[1])
        begin, end = _keys(low + ahead, high + ahead, k.shape[1], causal, window, first)
        rows, columns = jnp.arange(low, high) + ahead, jnp.arange(begin, end)
        own = None
        if segments is not None:
            own = segments[0][:, low:high], segments[1][:, begin:end]
        seen = visibility(rows, columns, own, **options)
        near = (x[:, begin:end].astype(jnp.float32) for x in (k, v))
        part = _mix(shared[:, low:high] * scale, *near, seen, sinks, soft_cap)
        mixed.append(part)
    return jnp.concatenate(mixed, 1).reshape(q.shape).astype(q.dtype)


def _keys(low: int, high: int, count: int, causal: bool, window, first):
    """Where the keys begin and end that queries at positions [low, high) may see."""
    end = min(high, count) if causal else count
    begin = 0 if window is None or first else low - window + 1
    end = max(end, 1)
    return min(max(begin, 0), end - 1), end


def _mix(q, k, v, seen, sinks, soft_cap):
    """[batch, q, groups, heads of a group, dim] of one block of scaled queries."""
    scores = jnp.einsum("bqgrd,btgd->bgrqt", q, k)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, None, None], scores, NEGATIVE)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    rest = 0.0
    if sinks is not None:
        logits = sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1, 1)
        largest = jnp.maximum(largest, jax.lax.stop_gradient(logits))
        rest = jnp.exp(logits - largest)[..., 0]
    shares = jnp.exp(scores - largest)
    total = shares.sum(-1) + rest
    weight = jnp.where(seen.any(-1)[:, None, None], 1 / total, 0.0)
    mixed = jnp.einsum("bgrqt,btgd->bqgrd", shares, v)
    return mixed * jnp.moveaxis(weight, 3, 1)[..., None]
