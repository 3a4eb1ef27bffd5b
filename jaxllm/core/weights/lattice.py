"""Eight consecutive inputs of an output as points of the lattice E8."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.lattice import points
from jaxllm.core.weights.base import Names, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lattice(Weight):
    """w[8 inputs, output] = sum_stage scale_stage point(code_stage).

    ``codes`` are [out, vectors] per stage, of 16 bits (E8P) or 8 (short points); the
    codebook is computed, not stored. ``scale`` [stages] is the whole matrix's.
    """

    codes: tuple[Leaf[Array], ...]
    scale: Leaf[Float[Array, "*lead stages"]]
    features: int = static()
    dtype: str = static("float32")

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.codes[0].shape[-2]

    def materialize(self) -> Float[Array, "*lead in out"]:
        scales = self.scale.astype(jnp.float32)[..., None, None, None]
        scales = jnp.moveaxis(scales, -4, 0)
        parts = [points(c) * s for c, s in zip(self.codes, scales, strict=True)]
        vectors = sum(parts[1:], parts[0])
        dense = vectors.reshape(*vectors.shape[:-2], -1)[..., : self.features]
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def axes(self, names: Names) -> Lattice:
        codes = tuple((names[1], None) for _ in self.codes)
        return dataclasses.replace(self, codes=codes, scale=(None,))
