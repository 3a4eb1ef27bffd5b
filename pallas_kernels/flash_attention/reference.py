"""Exact attention with grouped heads, causal and local masks, segments and sinks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Bool, Float, Int

NEGATIVE = -0.7 * float(jnp.finfo(jnp.float32).max)
Segments = tuple[Int[Array, "batch q"], Int[Array, "batch kv"]]


def softmax_mix(
    q: Float[Array, "batch q heads dim"],
    k: Float[Array, "batch kv groups dim"],
    v: Float[Array, "batch kv groups dim"],
    visible: Bool[Array, "#batch #heads q kv"],
    sinks: Float[Array, "heads"] | None,
    *,
    soft_cap: float | None,
    scale: float | None,
) -> Float[Array, "batch q heads dim"]:
    """softmax(cap(scale q kT)) v over what each row sees; nothing seen gives zeros."""
    heads, groups, wide = q.shape[2], k.shape[2], jnp.float32
    if heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} key heads evenly")
    shape = *q.shape[:2], groups, heads // groups, q.shape[3]
    shared = q.astype(wide).reshape(shape)
    scores = jnp.einsum("bqgrd,btgd->bgrqt", shared, k.astype(wide))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    by_group = (visible.shape[0], groups, heads // groups, *visible.shape[2:])
    alike = visible.shape[1] == 1
    visible = visible[:, :, None] if alike else visible.reshape(by_group)
    scores = jnp.where(visible, scores, NEGATIVE)
    if sinks is not None:
        column = sinks.astype(wide).reshape(1, groups, -1, 1, 1)
        column = jnp.broadcast_to(column, (*scores.shape[:4], 1))
        scores = jnp.concatenate((scores, column), -1)
    shares = jax.nn.softmax(scores, -1)[..., : k.shape[1]]
    shares = jnp.where(visible, shares, 0.0)
    mixed = jnp.einsum("bgrqt,btgd->bqgrd", shares, v.astype(wide))
    return mixed.reshape(q.shape).astype(q.dtype)


def visibility(
    queries: Int[Array, "q"],
    keys: Int[Array, "kv"],
    segments: Segments | None = None,
    *,
    causal: bool,
    window: int | None,
    first: int,
) -> Bool[Array, "#batch q kv"]:
    """Who sees whom: not the future, within the window or among first, by position.

    Equal segments see each other; 0 is padding, which sees and shows nothing.
    """
    distance = queries[:, None] - keys[None, :]
    mask = jnp.ones(distance.shape, bool)
    if window is not None:
        mask = (jnp.abs(distance) < window) | (keys < first)[None, :]
    mask = (mask & (distance >= 0) if causal else mask)[None]
    if segments is None:
        return mask
    mine, theirs = segments[0][:, :, None], segments[1][:, None, :]
    return mask & (mine == theirs) & (mine != 0)


def check(
    q, k, v, segments=None, sinks=None, *, window: int | None = None, first: int = 0
) -> None:
    """Refuse shapes and options that have no meaning."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}; accepted: q [batch, q, heads, "
            "dim] with k and v [batch, kv, groups, dim]"
        )
    same, groups = (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3]), k.shape[2]
    if not same or not groups or q.shape[2] % groups:
        raise ValueError(
            f"q {q.shape} and k {k.shape}: batch and dim must agree, heads must be a "
            "multiple of groups"
        )
    if segments is not None:
        found, wanted = tuple(s.shape for s in segments), (q.shape[:2], k.shape[:2])
        if found != wanted:
            raise ValueError(f"segments {found}; accepted: {wanted}")
    check_sinks(sinks, q.shape[2])
    if window is not None and window < 1:
        raise ValueError(f"window {window}; accepted: None or at least 1")
    if first < 0 or (first and window is None):
        raise ValueError(f"first {first}; accepted: 0, or more with a window")


def check_sinks(sinks, heads: int) -> None:
    """Refuse sinks that are not one for each query head."""
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks {sinks.shape}; accepted: {(heads,)}")


def flash_attention(
    q: Float[Array, "batch q heads dim"],
    k: Float[Array, "batch kv groups dim"],
    v: Float[Array, "batch kv groups dim"],
    segments: Segments | None = None,
    sinks: Float[Array, "heads"] | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    first: int = 0,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "batch q heads dim"]:
    """o[i] = sum_j p_ij v[j], p_i = softmax over visible j of cap(scale q[i] . k[j]).

    Consecutive query heads share a key head. Query i stands at position i + kv - q,
    so the last query sees the last key. ``window`` keeps the keys closer than that
    many positions (|i - j| < window); ``first`` positions stay visible beyond it
    (StreamingLLM, arXiv:2309.17453). ``sinks`` are logits, one a head, that take part
    in the softmax but carry no value (gpt-oss). ``segments`` are ids of queries and
    keys: equal ids see each other, 0 is padding. ``soft_cap`` c maps a score s to
    c tanh(s / c) (Gemma 2). ``scale`` is dim^-1/2 by default. Scores and sums are
    float32; the result has the dtype of ``q``; a row that sees nothing is zero.
    """
    check(q, k, v, segments, sinks, window=window, first=first)
    keys = jnp.arange(k.shape[1])
    queries = jnp.arange(q.shape[1]) + k.shape[1] - q.shape[1]
    options = dict(causal=causal, window=window, first=first)
    seen = visibility(queries, keys, segments, **options)
    return softmax_mix(q, k, v, seen[:, None], sinks, soft_cap=soft_cap, scale=scale)
