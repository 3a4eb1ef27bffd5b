"""A few entries of a matrix with their places: outliers beside a dense main part."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.weights.base import Names, Weight

FEW = 32  # rows up to which the list is multiplied as it is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scattered(Weight):
    """``values`` [count] at the flat places ``index`` of [out, in], zero elsewhere.

    The index has the smallest unsigned type that holds in * out. Below one entry in
    16 to 32 this is smaller than a bit mask (see ``Sparse``); no kernel reads it (see
    ``Segmented``).
    """

    index: Leaf[UInt[Array, "*lead count"]]
    values: Leaf[Float[Array, "*lead count"]]
    features: int = static()
    outputs: int = static()

    @classmethod
    def of(cls, dense: Float[Array, "in out"], chosen, count: int) -> Scattered:
        """The ``count`` entries of ``dense`` that are ``chosen`` (bool [in, out])."""
        features, outputs = dense.shape
        flags = chosen.T.ravel()
        (places,) = jnp.nonzero(flags, size=count, fill_value=flags.size - 1)
        kept = jnp.arange(count) < flags.sum()
        values = jnp.where(kept, dense.T.ravel()[places], 0).astype(dense.dtype)
        index = places.astype(np.min_scalar_type(flags.size - 1))
        return cls(index, values, features, outputs)

    @staticmethod
    def size(shape: tuple[int, int], count: int, itemsize: int) -> int:
        """Bytes that ``count`` entries of a matrix would take."""
        index = np.min_scalar_type(shape[0] * shape[1] - 1).itemsize
        return count * (index + itemsize)

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.outputs

    @property
    def dtype(self):
        return self.values.dtype

    def materialize(self) -> Float[Array, "*lead in out"]:
        blank = jnp.zeros((*self.values.shape[:-1], self.outputs * self.features))
        add = lambda x, i, v: x.at[i].add(v)  # noqa: E731
        for _ in self.values.shape[:-1]:
            add = jax.vmap(add)
        flat = add(blank.astype(self.dtype), self.index.astype(jnp.uint32), self.values)
        return jnp.swapaxes(
            flat.reshape(*flat.shape[:-1], self.outputs, self.features), -1, -2
        )

    def dot(self, x):
        """Few rows: sums of x times the values over each output's run of the list."""
        tokens = x.size // x.shape[-1]
        if self.values.ndim != 1 or tokens > FEW:
            return self.expanded(
                x, f"{tokens} rows, or leading axes, of listed entries"
            )
        place = self.index.astype(jnp.uint32)
        source, target = place % self.features, place // self.features
        parts = x.reshape(tokens, -1)[:, source] * self.values.astype(x.dtype)[None]
        wide = parts.T.astype(jnp.float32)
        sums = jax.ops.segment_sum(wide, target, self.outputs, indices_are_sorted=True)
        return sums.T.astype(x.dtype).reshape(*x.shape[:-1], self.outputs)

    def axes(self, names: Names) -> Scattered:
        """One list for the whole matrix cannot be split: no axis names."""
        return dataclasses.replace(self, index=(None,), values=(None,))
