"""Named inputs: random and top-k block lists; Llama-3-8B with 80 to 95 % dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.blocks import block_index, top_blocks
from pallas_kernels.cases import attention_case
from pallas_kernels.flash_attention.cases import projections
from pallas_kernels.shapes import LLAMA3_8B_HEADS, TINY_HEADS


def random_mask(key, heads, batch, rows, columns, kept):
    """A random block mask with the diagonal; the first row of head 0 is empty."""
    shape = (batch, heads.queries, rows, columns)
    mask = jax.random.uniform(key, shape) < kept
    ends = (jnp.arange(rows)[:, None] + 1) * columns // rows - 1
    mask = mask | (jnp.arange(columns)[None, :] == ends)[None, None]
    return mask.at[:, 0, 0].set(False)


def make(key, *, heads, batch, queries, keys, block_q, block_k, keep, dynamic, dtype):
    """Projections and lists: the best ``keep`` blocks, or a random share of them."""
    q, k, v = projections(key, heads, batch, queries, keys, dtype)
    if dynamic:
        lists = top_blocks(q, k, block_q=block_q, block_k=block_k, keep=keep)
    else:
        rows, columns = -(-queries // block_q), -(-keys // block_k)
        mask = random_mask(key, heads, batch, rows, columns, keep / columns)
        lists = block_index(mask)
    return q, k, v, *lists


def listed_pairs(queries: int, keys: int, block_q: int, block_k: int, keep: int):
    """(query, key) pairs of causal lists of ``keep`` blocks, the diagonal one half."""
    pairs = 0
    for start in range(0, queries, block_q):
        end = min(start + block_q, queries) + keys - queries
        pairs += block_q * min(keep * block_k, end)
    return float(pairs)


def case(
    name, heads, queries, block_q, block_k, keep, *,
    keys=None, batch=1, dynamic=True, **options,
):  # fmt: skip
    """One case that keeps ``keep`` key blocks for each query block."""
    keys = keys or queries
    shown = listed_pairs(queries, keys, block_q, block_k, keep)
    blocks = dict(block_q=block_q, block_k=block_k)
    inputs = dict(batch=batch, queries=queries, keys=keys, keep=keep, dynamic=dynamic)
    options |= blocks
    return attention_case(name, heads, make, options, batch * shown, **inputs, **blocks)


def dropped(heads, length: int, percent: int, block_q: int, block_k: int):
    """A case that keeps 100 - percent of the key blocks of a whole row."""
    keep = max(2, length // block_k * (100 - percent) // 100)
    name = f"{length // 1024}k/{block_q}x{block_k}/drop{percent}"
    return case(name, heads, length, block_q, block_k, keep)


def _cases():
    tiny = TINY_HEADS
    yield case("top3", tiny, 256, 64, 64, 3, batch=2)
    yield case("random", tiny, 256, 64, 64, 2, dynamic=False)
    yield case("full", tiny, 128, 64, 64, 2, dynamic=False, causal=False)
    yield case("cap", tiny, 256, 128, 64, 3, soft_cap=20.0, scale=0.25)
    yield case("suffix-ragged", tiny, 100, 64, 64, 3, keys=300)
    yield case("128", tiny, 256, 128, 128, 2)
    yield dropped(LLAMA3_8B_HEADS, 8192, 90, 128, 128)
    for length in (32768, 65536):
        for percent in (80, 90, 95):
            yield dropped(LLAMA3_8B_HEADS, length, percent, 128, 128)
    yield dropped(LLAMA3_8B_HEADS, 32768, 90, 64, 64)


CASES = tuple(_cases())
