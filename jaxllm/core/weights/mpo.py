"""Matrix product operators: a matrix as a chain of small four-index tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.weights.base import Names, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MPO(Weight):
    """W[i1 i2 .., o1 o2 ..] = sum over bonds of prod_k core_k[b_k-1, i_k, o_k, b_k].

    ``cores`` [left bond, in, out, right bond]; the outer bonds are one, and the
    logical in and out are the products of the cores'.
    """

    cores: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        sizes = [core.shape[-3:-1] for core in self.cores]
        return math.prod(s[0] for s in sizes), math.prod(s[1] for s in sizes)

    @property
    def dtype(self):
        return self.cores[0].dtype

    @property
    def bonds(self) -> tuple[int, ...]:
        return tuple(core.shape[-1] for core in self.cores[:-1])

    def materialize(self) -> Float[Array, "*lead in out"]:
        if self.cores[0].ndim > 4:
            return jax.vmap(MPO.materialize)(self)
        return self.dot(jnp.eye(self.shape[0], dtype=self.dtype))

    def dot(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Core by core: input digits go in, output digits come out."""
        batch = x.shape[:-1]
        y = x.reshape(-1, 1, 1, x.shape[-1])  # rows, bond, outputs so far, inputs left
        for core in self.cores:
            left, inner, _, right = core.shape
            y = y.reshape(len(y), left, y.shape[2], inner, -1)
            y = jnp.einsum("nbpir,biod->ndpor", y, core.astype(x.dtype))
            y = y.reshape(len(y), right, -1, y.shape[-1])
        return y.reshape(*batch, -1)

    def axes(self, names: Names) -> MPO:
        """No bond and no digit of an index is an axis that could be split."""
        return MPO(tuple((None,) * core.ndim for core in self.cores))
