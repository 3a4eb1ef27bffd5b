"""Groups of inputs that are stored in different formats, and transposed weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxllm.core.arrays import Leaf, static, to_rank
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGroups(Weight):
    """Blocks of inputs, sorted by how they are stored: y = sum_k x_k W_k.

    ``order`` [blocks] names the blocks in the order of ``parts``, each a weight of
    some whole blocks. A short last block is stored in full.
    """

    order: Leaf[UInt[Array, "*lead blocks"]]
    parts: tuple[Any, ...]
    block: int = static()
    features: int = static()

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, base.shape(self.parts[0])[1]

    @property
    def dtype(self):
        return self.parts[0].dtype

    def materialize(self) -> Float[Array, "*lead in out"]:
        rows = jnp.concatenate([base.materialize(p) for p in self.parts], -2)
        blocks = rows.reshape(*rows.shape[:-2], -1, self.block, rows.shape[-1])
        back = jnp.argsort(self.order, axis=-1)[..., None, None]
        dense = jnp.take_along_axis(blocks, back, -3).reshape(rows.shape)
        return dense[..., : self.features, :]

    def dot(self, x):
        return self._sum(x, self.order, base.dot)

    def dot_experts(self, x, group_sizes):
        order = base.of_rows(self.order, x, group_sizes)
        return self._sum(x, order, functools.partial(base.dot, group_sizes=group_sizes))

    def _sum(self, x, order, dot):
        """The parts' products with their own blocks of x; ``order`` [..., blocks]."""
        blocks = order.shape[-1]
        short = blocks * self.block - self.features
        filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
        filled = filled.reshape(*x.shape[:-1], blocks, self.block)
        order = to_rank(order[..., None], filled.ndim)
        turned = jnp.take_along_axis(filled, order, -2)
        turned = turned.reshape(*x.shape[:-1], blocks * self.block)
        total, start = 0.0, 0
        for part in self.parts:
            stop = start + base.shape(part)[0]
            total = total + dot(turned[..., start:stop], part)
            start = stop
        return total

    def axes(self, names: Names) -> RowGroups:
        """Inputs cannot be split: neighbours are stored apart."""
        parts = tuple(
            p.axes((None, names[1])) if isinstance(p, Weight) else (None, names[1])
            for p in self.parts
        )
        return dataclasses.replace(self, order=(None,), parts=parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(Weight):
    """W = inner^T, for weights whose blocks run along the outputs."""

    inner: Any

    @property
    def shape(self) -> tuple[int, int]:
        rows, out = base.shape(self.inner)
        return out, rows

    @property
    def dtype(self):
        return self.inner.dtype

    def materialize(self) -> Float[Array, "*lead in out"]:
        return jnp.swapaxes(base.materialize(self.inner), -1, -2)

    def axes(self, names: Names) -> Transposed:
        return Transposed(self.inner.axes(names[::-1]))
