"""Weights that read only the inputs that matter most for each token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import Leaf, static, to_rank
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Preceded
from pallas_kernels.gated_matmul import op as gated_matmul

BLOCK = 128  # inputs that are read or left out together
FEW = 256  # rows: of more some token reads every block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(Preceded):
    """y = (x * top) W, where ``top`` marks the ``kept`` inputs of largest |x_i| g_i.

    ``gain`` g [in] says how much an input of size one matters. The rows of W that a
    token leaves out need not be read; all of them are stored. ``materialize`` is the
    map of the inputs that pass.
    """

    inner: Any
    gain: Leaf[Float[Array, "*lead in"]]
    kept: int = static()

    def before(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
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
        """Few rows of a plain array leave out the blocks that no token reads."""
        passed, w = self.before(x), self.inner
        blocks, rest = divmod(x.shape[-1], BLOCK)
        open_ = self.kept >= x.shape[-1]
        plain = not base.compressed(w) and w.ndim == 2 and not rest
        if open_ or not plain or x.size > FEW * x.shape[-1]:
            return base.dot(passed, w)
        used = (passed != 0).reshape(-1, blocks, BLOCK).any((0, 2))
        order = jnp.argsort(~used, stable=True).astype(jnp.int32)
        return gated_matmul(passed, w, order, used.sum(dtype=jnp.int32), block=BLOCK)

    def axes(self, names: Names) -> Gated:
        return dataclasses.replace(super().axes(names), gain=(names[0],))
