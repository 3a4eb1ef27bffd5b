"""What a forward pass reads: tokens and the values that vary with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.core.arrays import Leaf, traced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens of equal length with what packing and padding say about them.

    ``segments`` numbers the documents of a row from 1 (0 is padding), ``positions``
    restarts at each document, ``weights`` is the share of each token in statistics
    and losses (0 ignores it). ``None`` means one document per row without padding.
    """

    tokens: Leaf[Int[Array, "batch length"]]
    segments: Leaf[Int[Array, "batch length"] | None] = None
    positions: Leaf[Int[Array, "batch length"] | None] = None
    weights: Leaf[Float[Array, "batch length"] | None] = None


def counted(batches: Iterable[Batch]) -> Iterable[Batch]:
    """``batches`` as they are, an iterator as a list: they are read more than once.

    Raises:
      ValueError: There is none, or none that has a token of weight above 0.
    """
    held = list(batches) if isinstance(batches, Iterator) else batches
    shares = [batch.weights for batch in held]
    if not shares:
        raise ValueError("the calibration holds no batches; accepted: one or more")
    if not any(x is None or traced(x) or np.any(x) for x in shares):
        raise ValueError("all tokens of the calibration have weight 0: none counts")
    return held


def targets(
    batch: Batch,
) -> tuple[Int[Array, "batch length"], Float[Array, "batch length"]]:
    """The next token of each position, and its weight as a target.

    A target counts by its own weight. It counts nothing where it is padding, belongs
    to another document than the position that predicts it, or lies beyond the row.
    """
    following = jnp.roll(batch.tokens, -1, axis=1)
    weight = jnp.ones(batch.tokens.shape, jnp.float32)
    if batch.weights is not None:
        weight = jnp.roll(batch.weights.astype(jnp.float32), -1, axis=1)
    if batch.segments is not None:
        after = jnp.roll(batch.segments, -1, axis=1)
        weight = jnp.where((after == batch.segments) & (after != 0), weight, 0.0)
    return following, weight.at[:, -1].set(0.0)
