"""Exact attention on Hopper: cuDNN's, and our listed attention for what it lacks.

``jax.nn.dot_product_attention(implementation="cudnn")`` serves whole and causal
attention of equally long sequences, with a causal window, and has its own backward
pass. Caps on scores and queries that are a suffix of their keys go to the Mosaic GPU
kernel of ``listed_attention`` with every visible block on the list, and so do packed
documents, sinks, and what cuDNN would serve where it is not installed; gradients there
are the reference's.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import listed_attention as listed
from pallas_kernels import online_softmax as online
from pallas_kernels.flash_attention import reference
from pallas_kernels.op import with_gradient

BLOCK = 128  # rows and keys of a tile


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
    """See the reference. bfloat16 or float16; no first positions."""
    reference.check(q, k, v, segments, sinks, window=window, first=first)
    online.check_dtypes(q, k, v, interpret=interpret)
    compat.require_hopper(interpret)
    if first:
        raise NotImplementedError("first positions: in neither cuDNN nor our kernel")
    lacks = _cudnn_lacks(q, k, causal, window, soft_cap, interpret)
    if lacks is None and segments is None and sinks is None:
        with contextlib.suppress(RuntimeError):  # raised while tracing where it lacks
            return _cudnn(q, k, v, causal=causal, window=window, scale=scale)
    options = {"causal": causal, "window": window, "soft_cap": soft_cap, "scale": scale}
    return with_gradient(
        functools.partial(_visible_blocks, interpret=interpret, **options),
        functools.partial(reference.flash_attention, **options),
    )(q, k, v, segments, sinks)


def _cudnn_lacks(q, k, causal, window, soft_cap, interpret) -> str | None:
    """Why cuDNN cannot serve this, or None."""
    if interpret:
        return "cuDNN has no interpreter"
    if soft_cap is not None:
        return "cuDNN caps no scores"
    if causal and q.shape[1] != k.shape[1]:
        return "cuDNN aligns the first query with the first key"
    if window is not None and not causal:
        return "cuDNN's windows are causal"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"heads of width {q.shape[3]}; cuDNN takes multiples of 8 up to 128"
    return None


def _cudnn(q, k, v, *, causal, window, scale):
    behind = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        local_window_size=behind,
        implementation="cudnn",
    )


def _visible_blocks(q, k, v, segments, sinks, *, causal, window, soft_cap, scale,
                    interpret):  # fmt: skip
    """Our kernel over lists of the key blocks that a query block may see."""
    index, count = _lists(q.shape[1], k.shape[1], segments, window)
    return listed.attend(q, k, v, index, count, block_q=BLOCK, block_k=BLOCK,
                         causal=causal, scale=scale, soft_cap=soft_cap, window=window,
                         segments=segments, sinks=sinks,
                         interpret=interpret)  # fmt: skip


def _lists(queries: int, keys: int, segments, window: int | None):
    """Ascending lists [batch, 1, rows, columns] and their lengths, axes maybe one.

    A block is listed where ranges overlap: of the ids in it, of positions and window.
    """
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    if segments is None and window is None:
        index = jnp.arange(columns, dtype=jnp.int32)[None, None, None]
        return index, jnp.full((1, 1, 1), columns, jnp.int32)
    seen = jnp.ones((1, rows, columns), bool)
    if window is not None:
        start = jnp.arange(rows)[:, None] * BLOCK + keys - queries
        apart = start - jnp.arange(columns)[None] * BLOCK
        seen &= (jnp.abs(apart) < window + BLOCK - 1)[None]
    if segments is not None:
        (low, high), (least, most) = map(_range, segments)
        seen = seen & (low[:, :, None] <= most[:, None])
        seen = seen & (least[:, None] <= high[:, :, None])
    index = jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32)
    return index[:, None], seen.sum(-1, dtype=jnp.int32)[:, None]


def _range(ids):
    """The smallest and the largest id of each block [batch, blocks], 0 left out."""
    padded = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % BLOCK)))
    blocks = padded.reshape(len(ids), -1, BLOCK)
    most = jnp.iinfo(ids.dtype).max
    return jnp.where(blocks == 0, most, blocks).min(-1), blocks.max(-1)
