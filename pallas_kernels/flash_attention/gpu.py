"""Exact attention on Hopper: cuDNN's, and our listed attention for what it lacks.

``jax.nn.dot_product_attention(implementation="cudnn")`` serves whole and causal
attention of equally long sequences, with a causal window, and has its own backward
pass. Caps on scores and queries that are a suffix of their keys go to the Mosaic GPU
kernel of ``listed_attention`` with every block on the list, and so does what cuDNN
would serve where it is not installed; gradients there are the reference's.
"""

from __future__ import annotations

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
    """See the reference. bfloat16 or float16; no segments, sinks or first positions."""
    reference.check(q, k, v, window=window, first=first)
    online.check_dtypes(q, k, v, interpret=interpret)
    compat.require_hopper(interpret)
    asked = {"segments": segments, "sinks": sinks, "first": first or None}
    for name, value in asked.items():
        if value is not None:
            raise NotImplementedError(f"{name}: in neither cuDNN nor our kernel")
    lacks = _cudnn_lacks(q, k, causal, window, soft_cap, interpret)
    if lacks is None:
        try:
            return _cudnn(q, k, v, causal=causal, window=window, scale=scale)
        except RuntimeError as missing:  # raised while tracing, by jax
            lacks = str(missing)
    if window is not None:
        raise NotImplementedError(f"a window needs cuDNN, but: {lacks}")
    options = {"causal": causal, "soft_cap": soft_cap, "scale": scale}
    return with_gradient(
        functools.partial(_all_blocks, interpret=interpret, **options),
        functools.partial(reference.flash_attention, **options),
    )(q, k, v)


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


def _all_blocks(q, k, v, *, causal, soft_cap, scale, interpret):
    """Every key block on one list that all rows share."""
    blocks = -(-k.shape[1] // BLOCK)
    index = jnp.arange(blocks, dtype=jnp.int32)[None, None, None]
    count = jnp.full((1, 1, 1), blocks, jnp.int32)
    return listed.attend(q, k, v, index, count, block_q=BLOCK, block_k=BLOCK,
                         causal=causal, scale=scale, soft_cap=soft_cap,
                         interpret=interpret)  # fmt: skip
