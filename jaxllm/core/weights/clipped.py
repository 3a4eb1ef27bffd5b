"""Weights whose input is clipped first, to a learned share of its range."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import Leaf, peak, to_rank
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Preceded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clipped(Preceded):
    """y = clip(x) W: each token's inputs within ``share`` [] of its largest magnitude.

    Around rounded activations it is the rounding of a range that was shrunk.
    """

    inner: Any
    share: Leaf[Float[Array, "*lead"]]

    def before(self, x):
        top = peak(jnp.abs(x)) * to_rank(self.share, x.ndim).astype(x.dtype)
        return jnp.clip(x, -top, top)

    def axes(self, names: Names) -> Clipped:
        return Clipped(base.axes(self.inner, names), ())
