"""Vectors of consecutive inputs as entries of codebooks that add up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.packing import pack, unpack
from jaxllm.core.weights.base import Names, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vectors(Weight):
    """w[v inputs, output] = sum_stage table[stage, code], one code per stage.

    ``planes`` hold the packed codes [stage, out, bytes] of ``bits`` each, ``table`` is
    [stage, entries, length], shared by the whole matrix.
    """

    planes: Leaf[tuple[UInt8[Array, "*lead stage out _"], ...]]
    table: Leaf[Float[Array, "*lead stage entries length"]]
    bits: int = static()
    features: int = static()
    dtype: str = static("float32")

    @classmethod
    def encode(cls, codes, table, bits: int, features: int, dtype) -> Vectors:
        """From ``codes`` [stage, out, vectors]."""
        return cls(pack(codes, bits), table, bits, features, str(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.planes[0].shape[-2]

    def materialize(self) -> Float[Array, "*lead in out"]:
        length = self.table.shape[-1]
        codes = unpack(self.planes, self.bits, -(-self.features // length))
        table = self.table.astype(jnp.float32)
        pick = lambda t, c: t[c]  # noqa: E731
        for _ in table.shape[:-2]:
            pick = jax.vmap(pick)
        dense = pick(table, codes).sum(-4)
        dense = dense.reshape(*dense.shape[:-2], -1)[..., : self.features]
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def axes(self, names: Names) -> Vectors:
        planes = ((None, names[1], None),) * len(self.planes)
        return dataclasses.replace(self, planes=planes, table=(None, None, None))
