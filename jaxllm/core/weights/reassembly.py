"""An online transform that splits large channels and averages alike ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt8

from jaxllm.core.arrays import Leaf, to_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reassembly:
    """(x[first] + x[second]) / (2 parts) per channel [in].

    A channel that is whole has itself as ``second`` and one part; one that is split
    occurs ``parts`` times; one that stands for two is their mean.
    """

    first: Leaf[UInt[Array, "*lead in"]]
    second: Leaf[UInt[Array, "*lead in"]]
    parts: Leaf[UInt8[Array, "*lead in"]]
    diagonal = False

    def apply(self, x):
        both = jnp.take(x, self.first, -1) + jnp.take(x, self.second, -1)
        return both / to_rank(2 * self.parts.astype(x.dtype), x.ndim)

    def axes(self, name: str | None) -> Reassembly:
        return Reassembly((None,), (None,), (None,))
