"""Named inputs: masks, segments and sinks on tiny heads; Llama-3-8B prefills."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import attention_case
from pallas_kernels.shapes import LLAMA3_8B_HEADS, QWEN25_7B_HEADS, TINY_HEADS, Heads


def projections(key, heads: Heads, batch: int, queries: int, keys: int, dtype):
    """Unit-variance q [batch, q, heads, dim] and k, v [batch, kv, groups, dim]."""
    first, second, third = jax.random.split(key, 3)
    return (
        jax.random.normal(first, (batch, queries, heads.queries, heads.width), dtype),
        jax.random.normal(second, (batch, keys, heads.groups, heads.width), dtype),
        jax.random.normal(third, (batch, keys, heads.groups, heads.width), dtype),
    )


def documents(length: int) -> jax.Array:
    """[1, length] ids of two documents, the first a third, then a tail of padding."""
    place = jnp.arange(length)[None]
    ids = 1 + (place >= length // 3).astype(jnp.int32)
    return jnp.where(place < length - length // 8, ids, 0)


def make(key, *, heads, batch, queries, keys, packed, sinks, dtype):
    """Projections, then segments and sinks where the case has them."""
    arrays = projections(key, heads, batch, queries, keys, dtype)
    segments = None
    if packed:
        ids = jnp.tile(documents(keys), (batch, 1))
        segments = (ids[:, keys - queries :], ids)
    logits = jax.random.normal(key, (heads.queries,), dtype) if sinks else None
    return *arrays, segments, logits


def visible_pairs(queries: int, keys: int, causal: bool, window: int | None) -> float:
    """How many (query, key) pairs a mask shows."""
    if not causal:
        return float(queries) * keys
    span = keys if window is None else min(window, keys)
    return float(sum(min(keys - queries + i + 1, span) for i in range(queries)))


def case(
    name, heads, queries, keys=None, *, batch=1, packed=False, sinks=False, **options
):
    """One case; options are the op's."""
    keys = keys or queries
    shown = visible_pairs(
        queries, keys, options.get("causal", True), options.get("window")
    )
    inputs = dict(batch=batch, queries=queries, keys=keys, packed=packed, sinks=sinks)
    return attention_case(name, heads, make, options, batch * shown, **inputs)


def _cases():
    tiny, llama, qwen = TINY_HEADS, LLAMA3_8B_HEADS, QWEN25_7B_HEADS
    yield case("causal", tiny, 256, batch=2)
    yield case("full-ragged", tiny, 100, 130, causal=False)
    yield case("suffix", tiny, 128, 256, scale=0.25)
    yield case("packed", tiny, 256, packed=True)
    yield case("window-first-cap", tiny, 256, window=50, first=4, soft_cap=20.0)
    yield case("sinks-window", tiny, 256, sinks=True, window=128)
    for length in (2048, 8192, 65536):
        yield case(f"causal/{length // 1024}k", llama, length)
    yield case("packed/8k", llama, 8192, packed=True)
    yield case("window4k-first4/32k", llama, 32768, window=4096, first=4)
    yield case("sinks-window4k/32k", llama, 32768, sinks=True, window=4096)
    yield case("chunk2k/32k", llama, 2048, 32768)
    yield case("causal/8k", qwen, 8192, batch=2)


CASES = tuple(_cases())
