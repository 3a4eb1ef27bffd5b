"""Codes that index learned tables: one small codebook per output and block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.packing import pack, unpack
from jaxllm.core.weights.base import LEADING, Names, Weight
from pallas_kernels.table_matmul import op as table_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook(Weight):
    """value = table[output, block of the input, code], stored [out, in].

    ``planes`` hold the packed codes [out, bytes], ``table`` [out, blocks, entries].
    ``block`` inputs share a table (None: all of an output).
    """

    planes: Leaf[tuple[UInt8[Array, "*lead out _"], ...]]
    table: Leaf[Float[Array, "*lead out blocks entries"]]
    block: int | None = static()
    features: int = static()
    dtype: str = static("float32")

    @classmethod
    def encode(cls, values, table, block, dtype) -> Codebook:
        """The nearest entries to ``values`` [out, in] of stored tables."""
        blocks = _blocks(values, table.shape[-2], block)
        gap = jnp.abs(blocks[..., None] - table.astype(jnp.float32)[..., None, :])
        codes = gap.argmin(-1).astype(jnp.uint8)
        codes = codes.reshape(len(values), -1)[:, : values.shape[-1]]
        planes = pack(codes, _bits(table))
        return cls(planes, table, block, values.shape[-1], str(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.planes[0].shape[-2]

    def materialize(self) -> Float[Array, "*lead in out"]:
        codes = unpack(self.planes, _bits(self.table), self.features)
        blocks = _blocks(codes, self.table.shape[-2], self.block)
        dense = jnp.take_along_axis(self.table, blocks.astype(jnp.int32), -1)
        dense = dense.reshape(*codes.shape[:-1], -1)[..., : self.features]
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def dot(self, x):
        if self.table.ndim != 3:
            return self.expanded(x, LEADING)
        bits = _bits(self.table)
        return table_matmul(x, self.planes, self.table, bits=bits, block=self.block)

    def axes(self, names: Names) -> Codebook:
        inner, outer = names
        planes = ((outer, inner),) * len(self.planes)
        table = (outer, None if self.block is None else inner, None)
        return dataclasses.replace(self, planes=planes, table=table)


def _bits(table) -> int:
    return (table.shape[-1] - 1).bit_length()


def _blocks(rows, count: int, block: int | None):
    """[..., in] as [..., blocks, inputs of a block], filled with zeros."""
    short = count * (block or rows.shape[-1]) - rows.shape[-1]
    filled = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])
    return filled.reshape(*rows.shape[:-1], count, -1)
