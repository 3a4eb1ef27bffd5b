"""What a forward pass reads: tokens and the values that vary with them."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from jaxllm.core.arrays import Leaf


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
