"""Kronecker transforms of a layer's input: two small matrices for a large one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """x (L (x) R): channels as a matrix X [a, b] become LT X R; L, R invertible.

    It costs a + b products per channel in place of a b. ``right`` None is the
    identity: ``left`` mixes heads [a] and keeps what is inside them apart.
    """

    left: Leaf[Float[Array, "*lead a a"]]
    right: Leaf[Float[Array, "*lead b b"] | None] = None
    diagonal = False

    def apply(self, x):
        cells = x.reshape(*x.shape[:-1], self.left.shape[-1], -1)
        if self.right is not None:
            cells = cells @ self.right.astype(x.dtype)
        mixed = jnp.einsum("...ab,ac->...cb", cells, self.left.astype(x.dtype))
        return mixed.reshape(x.shape)

    def inverse(self, x):
        return self.inverted().apply(x)

    def inverted(self) -> Kronecker:
        """(L (x) R)^-1 in float32."""
        undo = lambda m: jnp.linalg.inv(m.astype(jnp.float32))  # noqa: E731
        return Kronecker(
            undo(self.left), None if self.right is None else undo(self.right)
        )

    def rows(self, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """(L (x) R) W: the transform of the rows of a weight."""
        turned = jax.tree.map(lambda m: m.T, self)
        return turned.apply(w.T).T

    def axes(self, name: str | None) -> Kronecker:
        pair = (None, None)
        return Kronecker(pair, None if self.right is None else pair)
