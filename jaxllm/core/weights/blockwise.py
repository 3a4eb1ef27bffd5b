"""One constant per block of inputs: what K-quants subtract from their codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import static
from jaxllm.core.weights.base import Names, Weight, materialize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blockwise(Weight):
    """W[i, o] = values[o, i // block], so that x W = (sums of x over blocks) values^T.

    ``values`` is [out, blocks], or quantized as a line [out * blocks, 1]. The last
    block may be short.
    """

    values: Any
    outputs: int = static()
    block: int = static()
    features: int = static()
    dtype: str = static("float32")

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.outputs

    def _table(self):
        """Values [out, blocks] in float32."""
        table = materialize(self.values).astype(jnp.float32)
        if not isinstance(self.values, Weight):
            return table
        return table.reshape(*table.shape[:-2], self.outputs, -1)

    def materialize(self):
        wide = jnp.repeat(self._table(), self.block, -1)[..., : self.features]
        return jnp.swapaxes(wide, -1, -2).astype(self.dtype)

    def dot(self, x):
        short = -self.features % self.block
        filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
        sums = filled.reshape(*x.shape[:-1], -1, self.block).sum(-1)
        return sums @ jnp.swapaxes(self._table(), -1, -2).astype(x.dtype)

    def rows(self, ids):
        mine = jnp.take(self._table(), ids, axis=-2, mode="clip")
        return jnp.repeat(mine, self.block, -1)[..., : self.features].astype(self.dtype)

    def axes(self, names: Names) -> Blockwise:
        inner, outer = names
        values = self.values
        values = (
            values.axes((None, None)) if isinstance(values, Weight) else (outer, inner)
        )
        return dataclasses.replace(self, values=values)
