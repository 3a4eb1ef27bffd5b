"""Attention over listed blocks of keys: each head and query block has its own list."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Bool, Float, Int
from pallas_kernels.flash_attention.reference import check, softmax_mix


def listed(
    index: Int[Array, "batch heads qblocks width"],
    count: Int[Array, "batch heads qblocks"],
    blocks: int,
) -> Bool[Array, "batch heads qblocks kblocks"]:
    """The block mask that an index stands for (inverse of ``block_index``)."""
    valid = jnp.arange(index.shape[-1]) < count[..., None]
    chosen = jax.nn.one_hot(jnp.where(valid, index, blocks), blocks, dtype=jnp.int32)
    return chosen.sum(-2) > 0


def check_blocks(q, k, index, count, *, block_q: int, block_k: int) -> None:
    """Refuse lists that do not match the sequences."""
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks {block_q} x {block_k}; accepted: at least 1")
    want = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    if index.shape[:3] != want or index.ndim != 4 or count.shape != want:
        raise ValueError(
            f"index {index.shape} and count {count.shape}; accepted for q {q.shape} "
            f"in blocks of {block_q}: {(*want, 'width')} and {want}"
        )


def block_sparse_attention(
    q: Float[Array, "batch q heads dim"],
    k: Float[Array, "batch kv groups dim"],
    v: Float[Array, "batch kv groups dim"],
    index: Int[Array, "batch heads qblocks width"],
    count: Int[Array, "batch heads qblocks"],
    *,
    block_q: int,
    block_k: int,
    causal: bool = True,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "batch q heads dim"]:
    """o[i] = sum_j p_ij v[j] over the keys j in the blocks that i's block lists.

    Query block n of head h sees key blocks index[b, h, n, :count[b, h, n]] (distinct
    ids; entries from count on are ignored), and within them, when ``causal``, no key
    after the query: query i stands at position i + kv - q. Short last blocks are
    allowed. Masks may be static or computed per input (MInference, arXiv:2407.02490;
    InfLLM, arXiv:2402.04617): see ``block_index`` and ``top_blocks``. Scores and sums
    are float32; the result has the dtype of ``q``; a row that sees nothing is zero.
    """
    check(q, k, v)
    check_blocks(q, k, index, count, block_q=block_q, block_k=block_k)
    queries, keys = q.shape[1], k.shape[1]
    mask = listed(index, count, -(-keys // block_k))
    mask = jnp.repeat(jnp.repeat(mask, block_q, axis=2), block_k, axis=3)
    mask = mask[:, :, :queries, :keys]
    if causal:
        place = jnp.arange(queries)[:, None] + keys - queries
        mask = mask & (place >= jnp.arange(keys)[None, :])[None, None]
    return softmax_mix(q, k, v, mask, None, soft_cap=soft_cap, scale=scale)
