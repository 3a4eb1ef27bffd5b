"""Weights that read only the inputs that matter most for each token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import Leaf, static, to_rank
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(Wrapper):
    """y = (x * top) W, where ``top`` marks the ``kept`` inputs of largest |x_i| g_i.

    ``gain`` g [in] says how much an input of size one matters. The rows of W that a
    token leaves out need not be read; all of them are stored. ``materialize`` is the
    map of the inputs that pass.
    """

    inner: Any
    gain: Leaf[Float[Array, "*lead in"]]
    kept: int = static()

    def gate(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """``x`` with zeros for all but the ``kept`` inputs that matter most."""
        if self.kept >= x.shape[-1]:
            return x
        score = jnp.abs(x) * to_rank(self.gain, x.ndim).astype(x.dtype)
        index = jax.lax.top_k(score, self.kept)[1]
        top = jnp.put_along_axis(
            jnp.zeros(x.shape, bool), index, True, axis=-1, inplace=False
        )
        return jnp.where(top, x, jnp.zeros((), x.dtype))

    def dot(self, x):
        return base.dot(self.gate(x), self.inner)

    def axes(self, names: Names) -> Gated:
        return dataclasses.replace(super().axes(names), gain=(names[0],))
