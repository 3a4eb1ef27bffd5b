"""What a forward pass reads: tokens and the values that vary with them."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens of equal length with what packing and padding say about them.

    ``segments`` numbers the documents of a row from 1 (0 is padding), ``positions``
    restarts at each document, ``weights`` is the share of each token in statistics
    and losses (0 ignores it). ``None`` means one document per row without padding.
    """

    tokens: Int[Array, "batch length"]
    segments: Int[Array, "batch length"] | None = None
    positions: Int[Array, "batch length"] | None = None
    weights: Float[Array, "batch length"] | None = None
