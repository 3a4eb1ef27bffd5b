"""Low-rank magnitudes with the sign of every entry apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.packing import pack, unpack
from jaxllm.core.weights.base import LEADING, Names, Weight
from pallas_kernels.plane_matmul import op as plane_matmul

FEW = 256  # rows of x times rank up to which products with signs win


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signed(Weight):
    """W = sign * (first @ second), signs as bits [out, in / 8]: about 1 bit per weight.

    ``first`` [in, rank], ``second`` [rank, out].
    """

    signs: Leaf[UInt8[Array, "*lead out _"]]
    first: Leaf[Float[Array, "*lead in rank"]]
    second: Leaf[Float[Array, "*lead rank out"]]
    dtype: str = static("float32")

    @classmethod
    def of(cls, negative, first, second, dtype) -> Signed:
        """``negative`` (bool [in, out]) tells which entries are below zero."""
        (signs,) = pack(negative.T.astype(jnp.uint8), 1)
        return cls(signs, first, second, str(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape[-2], self.second.shape[-1]

    def materialize(self) -> Float[Array, "*lead in out"]:
        negative = jnp.swapaxes(unpack((self.signs,), 1, self.first.shape[-2]), -1, -2)
        wide = lambda x: x.astype(jnp.float32)  # noqa: E731
        size = wide(self.first) @ wide(self.second)
        return jnp.where(negative.astype(bool), -size, size).astype(self.dtype)

    def dot(self, x):
        """sum_r (x * first_r) signs * second_r: ``rank`` products, no dense array."""
        if self.first.ndim != 2:
            return self.expanded(x, LEADING)
        (features, rank), tokens = self.first.shape, x.size // x.shape[-1]
        if rank * tokens > FEW:
            return self.expanded(x, f"{tokens} rows times rank {rank} exceed {FEW}")
        one = jnp.ones((self.shape[1], 1), jnp.float32)
        each = x.reshape(tokens, 1, features) * self.first.T.astype(x.dtype)[None]
        sums = plane_matmul(each, (self.signs,), (-one,), kind="binary", block=None)
        y = (sums * self.second.astype(x.dtype)[None]).sum(1)
        return y.reshape(*x.shape[:-1], self.shape[1])

    def axes(self, names: Names) -> Signed:
        inner, outer = names
        return dataclasses.replace(
            self, signs=(outer, inner), first=(inner, None), second=(None, outer)
        )
