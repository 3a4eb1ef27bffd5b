"""TPU: jax's splash attention behind our op, with block masks found in closed form.

Splash (``jax.experimental.pallas.ops.tpu.splash_attention``) brings both kernels,
forward and backward. Its own mask classes evaluate every block of the mask in NumPy,
36 s for 64k positions; intervals give the same lists of blocks at once, and one mask
function covers windows with first positions, which splash does not offer.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)

from pallas_kernels.flash_attention.reference import (
    NEGATIVE,
    check,
    visibility,
)

LANES = 128


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Positions a block of queries and of keys; keys that a step multiplies."""

    block_q: int = 512
    block_k: int = 1024
    compute: int = 512


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which key positions below ``keys`` a query position sees; hashes by value."""

    keys: int
    causal: bool
    window: int | None
    first: int

    def __call__(self, queries, keys):
        """Elementwise, in the kernel; both are int32 positions of one shape."""
        seen = keys < self.keys
        if self.window is not None:
            near = jnp.abs(queries - keys) < self.window
            seen = seen & (near | (keys < self.first))
        return seen & (queries >= keys) if self.causal else seen

    def blocks(self, low, high, block: int, count: int) -> np.ndarray:
        """bool[len(low), count]: key blocks that queries low..high (ends in) see."""
        starts = np.arange(count) * block
        ends = np.minimum(starts + block, self.keys) - 1
        low, high = low[:, None], high[:, None]
        seen = starts <= np.where(self.causal, high, self.keys - 1)
        if self.window is not None:
            near = (ends > low - self.window) & (starts < high + self.window)
            seen &= near | (starts < self.first)
        return seen & (starts < self.keys)


def compressed(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row the ids of the true columns, then the last again, and which are real."""
    counts = seen.sum(1)
    width = max(int(counts.max()), 1)
    order = np.argsort(~seen, axis=1, kind="stable")[:, :width]
    valid = np.arange(width) < counts[:, None]
    last = np.take_along_axis(order, np.maximum(counts - 1, 0)[:, None], 1)
    return np.where(valid, order, last).astype(np.int32), valid


def mask_info(mask: Mask, offset: int, sizes, lengths, transposed: bool):
    """Splash's description of a mask: block lists along keys (or along queries)."""
    positions = np.arange(lengths[0], dtype=np.int32) + offset
    low = positions[:: sizes[0]]
    seen = mask.blocks(low, low + sizes[0] - 1, sizes[1], lengths[1] // sizes[1])
    ids, valid = compressed(seen.T if transposed else seen)
    if transposed:
        ids, valid = ids.T, valid.T
    small = np.int16 if max(seen.shape) < 2**15 else np.int32
    return splash_attention_mask_info.MaskInfo(
        data_next=ids[None].astype(small),
        mask_next=None,
        block_mask=valid[None].astype(np.int8),
        partial_mask_blocks=None,
        q_sequence=positions,
    )


def dividing(length: int, largest: int) -> int:
    """The largest block of at most ``largest`` (a power of two) that divides."""
    return next(
        b for b in (2048, 1024, 512, 256, LANES) if b <= largest and not length % b
    )


def make_kernel(mask: Mask, offset: int, lengths, tuning: Tuning, soft_cap, interpret):
    """Splash's callable for one sequence: q [heads, q, dim], k, v [groups, kv, dim]."""
    bq = dividing(lengths[0], tuning.block_q)
    bk = dividing(lengths[1], tuning.block_k)
    step = min(tuning.compute, bk)
    forward = mask_info(mask, offset, (bq, bk), lengths, False)
    return splash_attention_kernel.SplashAttentionKernel(
        jax.tree.map(jnp.asarray, forward),
        jax.tree.map(jnp.asarray, forward),
        jax.tree.map(jnp.asarray, mask_info(mask, offset, (bq, bk), lengths, True)),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=bq, block_kv=bk, block_kv_compute=step,
            block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=step,
            block_q_dq=bq, block_kv_dq=bk,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=NEGATIVE,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=None,
        mask_function=mask,
        interpret=interpret,
    )  # fmt: skip


def padded(x, axis: int, multiple: int):
    """Zeros at the end of an axis, up to a multiple."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pad)


def flash_attention(
    q, k, v, segments=None, sinks=None, *, causal=True, window=None, first=0,
    soft_cap=None, scale=None, interpret=False, tuning: Tuning | None = None,
):  # fmt: skip
    """The reference's arguments; sequences are padded to whole lanes."""
    check(q, k, v, segments, sinks, window=window, first=first)
    queries, keys, dtype = q.shape[1], k.shape[1], q.dtype
    if causal and queries > keys:
        raise NotImplementedError("causal queries that stand before the first key")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = Mask(keys, causal, window, first)
    heads_first = [
        jnp.swapaxes(padded(a, 1, LANES), 1, 2)
        for a in (q * jnp.asarray(scale, dtype), k, v)
    ]
    lengths = tuple(a.shape[2] for a in heads_first[:2])
    kernel = make_kernel(
        mask, keys - queries, lengths, tuning or Tuning(), soft_cap, interpret
    )
    ids = None
    if segments is not None:
        ids = splash_attention_kernel.SegmentIds(
            *(padded(s, 1, LANES) for s in segments)
        )
    run = jax.vmap(functools.partial(kernel, sinks=sinks), in_axes=(0, 0, 0, 0))
    out = jnp.swapaxes(run(*heads_first, ids), 1, 2)[:, :queries].astype(dtype)
    if segments is None and (window is None or queries <= keys):
        return out  # every row sees the key at its own position, or all keys
    # Of a row that sees nothing splash gives any values or NaN: this op gives zeros.
    positions = jnp.arange(queries) + keys - queries
    options = dict(causal=causal, window=window, first=first)
    seen = visibility(positions, jnp.arange(keys), segments, **options).any(-1)
    return jnp.where(seen[..., None, None], out, jnp.zeros((), dtype))
