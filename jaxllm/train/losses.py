"""Losses: ``(model, batch, key) -> (total, weight)``, summed over target tokens.

Sums instead of means make gradient accumulation exact: totals and weights of parts
of a batch add up to those of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.core.batch import Batch, targets
from jaxllm.core.model import Model

Loss = Callable[[Model, Batch, Array], tuple[Array, Array]]


def next_token(
    *,
    chunk: int | None = None,
    z: float = 0.0,
    scan: bool = False,
    remat: bool = False,
) -> Loss:
    """Cross entropy of the next token, in nats, with masks of packing and padding.

    Args:
      chunk: Positions whose logits are held at a time: the head runs chunk by chunk
        and again in the backward pass, so that [batch, length, vocabulary] never
        exists. ``None`` takes the whole row at once.
      z: Weight of (log Z)^2, which keeps the normaliser near one (PaLM,
        arXiv:2204.02311, section 5).
      scan: Compile runs of equal layers once (slower on CPU, faster to compile).
      remat: Recompute each block's activations in the backward pass.

    Raises:
      ValueError: chunk below 1 or negative z.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected 1 or more positions, or None")
    if z < 0:
        raise ValueError(f"z is {z}, expected 0 or more")

    def loss(model: Model, batch: Batch, key: Array) -> tuple[Array, Array]:
        following, weight = targets(batch)
        hidden = model.config.forward(
            model.params,
            batch.tokens,
            positions=batch.positions,
            segments=batch.segments,
            scan=scan,
            remat=remat,
            hidden_only=True,
        )
        part = functools.partial(_total, model, z)
        if chunk is None or chunk >= hidden.shape[1]:
            return part(hidden, following, weight), weight.sum()
        return _chunked(part, chunk, hidden, following, weight), weight.sum()

    return loss


def _total(model: Model, z: float, hidden, following, weight) -> Array:
    """Weighted sum of -log p(following | hidden), plus z (log Z)^2."""
    # A masked position may hold anything, infinities included: what the head reads of
    # it is replaced too, or the gradient would be 0 times infinity.
    counts = weight > 0
    hidden = jnp.where(counts[..., None], hidden, 0.0)
    logits = model.config.head(model.params, hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    nats = log_z - chosen
    if z:
        nats = nats + z * jnp.square(log_z)
    return jnp.where(counts, nats * weight, 0.0).sum()


def _chunked(part, chunk: int, hidden, following, weight) -> Array:
    """The sum of ``part`` over chunks of positions, one at a time."""
    spare = -hidden.shape[1] % chunk

    def fold(x):
        padded = jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2))
        split = padded.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def add(total, piece):
        return total + jax.checkpoint(part)(*piece), None

    pieces = jax.tree.map(fold, (hidden, following, weight))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), pieces)[0]
