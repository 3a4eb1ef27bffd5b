"""Lists of key blocks: from a block mask, or from scores of mean-pooled blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Bool, Float, Int

Index = tuple[
    Int[Array, "batch heads qblocks width"], Int[Array, "batch heads qblocks"]
]


def block_index(
    mask: Bool[Array, "batch heads qblocks kblocks"], width: int | None = None
) -> Index:
    """The ascending ids of the true blocks of each row, and how many there are.

    ``width`` is the length of the lists (default: all key blocks); a row with more
    true blocks than that loses its last ones. Entries from count on repeat the last
    id, so that a kernel that fetches ahead fetches nothing new.
    """
    width = mask.shape[-1] if width is None else width
    if not 1 <= width <= mask.shape[-1]:
        raise ValueError(f"width {width}; accepted: 1 to {mask.shape[-1]} key blocks")
    count = jnp.minimum(mask.sum(-1, dtype=jnp.int32), width)
    order = jnp.argsort(~mask, axis=-1, stable=True)[..., :width].astype(jnp.int32)
    last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[..., None], -1)
    return jnp.where(jnp.arange(width) < count[..., None], order, last), count


def pooled(x: Float[Array, "batch n heads dim"], block: int):
    """The float32 mean of each block of positions; the last block may be short."""
    short = -x.shape[1] % block
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, short), (0, 0), (0, 0)))
    sums = wide.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(2)
    sizes = jnp.minimum(block, x.shape[1] - block * jnp.arange(sums.shape[1]))
    return sums / sizes[None, :, None, None]


def top_blocks(
    q: Float[Array, "batch q heads dim"],
    k: Float[Array, "batch kv groups dim"],
    *,
    block_q: int,
    block_k: int,
    keep: int,
    causal: bool = True,
    first: int = 1,
    local: int = 1,
) -> Index:
    """The ``keep`` key blocks with the largest mean(q block) . mean(k block).

    The dynamic block-sparse pattern of MInference (arXiv:2407.02490, algorithm 2).
    The ``first`` blocks and, when causal, the ``local`` last visible ones are always
    kept: without the block on the diagonal a row could see nothing. No block wholly
    in the future is listed, so early rows have fewer than ``keep``.
    """
    if not first + local <= keep:
        raise ValueError(f"keep {keep}; accepted: at least first + local blocks")
    groups = q.shape[2] // k.shape[2]
    means = pooled(q, block_q), jnp.repeat(pooled(k, block_k), groups, axis=2)
    scores = jnp.einsum("bnhd,bmhd->bhnm", *means)
    block = jnp.arange(scores.shape[-1])[None, :]
    last = jnp.full((scores.shape[2], 1), scores.shape[-1] - 1)
    if causal:
        ends = jnp.minimum((jnp.arange(scores.shape[2]) + 1) * block_q, q.shape[1])
        last = ((ends - 1 + k.shape[1] - q.shape[1]) // block_k)[:, None]
    kept = (block < first) | (causal & (block > last - local))
    scores = jnp.where(kept[None, None], jnp.inf, scores)
    scores = jnp.where((block <= last)[None, None], scores, -jnp.inf)
    width = min(keep, scores.shape[-1])
    best, ids = jax.lax.top_k(scores, width)
    rows = tuple(jnp.ogrid[tuple(slice(n) for n in scores.shape[:3])])
    rows = tuple(a[..., None] for a in rows)
    mask = jnp.zeros(scores.shape, bool).at[*rows, ids].set(best > -jnp.inf)
    return block_index(mask, width)
