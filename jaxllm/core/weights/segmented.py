"""A few entries of a large matrix, in segments that a kernel reads."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, UInt8, UInt16

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.weights.base import LEADING, Names, Weight
from pallas_kernels.scattered_matmul import op as scattered_matmul
from pallas_kernels.scattered_matmul import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segmented(Weight):
    """The leaves of ``pallas_kernels.scattered_matmul.segments.Segments``.

    About as large as a list (``Scattered``) from one entry in a hundred on, larger
    where entries are fewer or the matrix is small.
    """

    stripe: Leaf[UInt16[Array, "*lead groups"]]
    window: Leaf[UInt16[Array, "*lead segments"]]
    place: Leaf[UInt8[Array, "*lead segments slots"]]
    end: Leaf[UInt8[Array, "*lead segments stripe_outputs"]]
    value: Leaf[Float[Array, "*lead segments slots"]]
    features: int = static()
    outputs: int = static()

    @classmethod
    def of(
        cls, dense: Float[Array, "in out"], chosen: Bool[Array, "in out"], count: int
    ) -> Segmented:
        """The ``chosen`` entries of ``dense``, of which there are at most ``count``."""
        return cls(*segments.pack(dense, chosen, count), *dense.shape)

    size = staticmethod(segments.size)

    @property
    def segments(self) -> segments.Segments:
        return segments.Segments(
            self.stripe, self.window, self.place, self.end, self.value
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.outputs

    @property
    def dtype(self):
        return self.value.dtype

    def materialize(self) -> Float[Array, "*lead in out"]:
        return segments.unpack(self.segments, self.shape)

    def dot(self, x):
        if self.stripe.ndim != 1:
            return self.expanded(x, LEADING)
        return scattered_matmul(x, self.segments, outputs=self.outputs)

    def axes(self, names: Names) -> Segmented:
        """One list for the whole matrix cannot be split: no axis names."""
        line, wide = (None,), (None, None)
        return dataclasses.replace(
            self, stripe=line, window=line, place=wide, end=wide, value=wide
        )
