"""Online transforms of a layer's input, and the weight that expects them.

y = op(x) W' with W = op's matrix times W'. An op is linear: ``apply(x)`` along the
last axis, ``inverse(x)``, and ``diagonal`` says whether channels stay apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxllm.core.arrays import Leaf, static, to_rank
from jaxllm.core.hadamard import hadamard_matrix, hadamard_transform
from jaxllm.core.packing import pack, unpack
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Preceded, Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """x * factor per channel [in]."""

    factor: Leaf[Float[Array, "*lead in"]]
    diagonal = True

    def apply(self, x):
        return x * to_rank(self.factor, x.ndim).astype(x.dtype)

    def inverse(self, x):
        return x / to_rank(self.factor, x.ndim).astype(x.dtype)

    def axes(self, name: str | None) -> Scale:
        return Scale((name,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flip:
    """x * (1 or -1) per channel: signs of ``width`` channels, a bit each."""

    bits: Leaf[UInt8[Array, "*lead bytes"]]
    width: int = static()
    diagonal = True

    @classmethod
    def random(cls, key: jax.Array, width: int) -> Flip:
        flags = jax.random.bernoulli(key, shape=(width,)).astype(jnp.uint8)
        return cls(pack(flags, 1)[0], width)

    def apply(self, x):
        signs = 1 - 2 * unpack((self.bits,), 1, self.width).astype(x.dtype)
        return x * to_rank(signs, x.ndim)

    def inverse(self, x):
        return self.apply(x)

    def axes(self, name: str | None) -> Flip:
        return dataclasses.replace(self, bits=(None,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hadamard:
    """x D H / sqrt(order): random signs [in], then a (block-diagonal) Hadamard.

    ``signs`` None leaves them out. ``group`` > 1 transforms across heads: the last
    axis is [heads, group] and the transform runs over heads.
    """

    signs: Leaf[Float[Array, "*lead in"] | None] = None
    order: int | None = static(None)
    group: int = static(1)
    diagonal = False

    def apply(self, x):
        run = lambda y: hadamard_transform(y, order=self.order)  # noqa: E731
        return self._mix(self._signed(x), run)

    def inverse(self, x):
        return self._signed(self._mix(x, lambda y: _transposed(y, self.order)))

    def _signed(self, x):
        if self.signs is None:
            return x
        return x * to_rank(self.signs, x.ndim).astype(x.dtype)

    def _mix(self, x, run):
        if self.group == 1:
            return run(x)
        heads = x.reshape(*x.shape[:-1], -1, self.group)
        mixed = run(jnp.swapaxes(heads, -1, -2))
        return jnp.swapaxes(mixed, -1, -2).reshape(x.shape)

    def axes(self, name: str | None) -> Hadamard:
        return dataclasses.replace(self, signs=None if self.signs is None else (None,))


def _transposed(y, order):
    """y HT: the transform is symmetric only for Sylvester's matrices."""
    return y @ jnp.asarray(hadamard_matrix(y.shape[-1], order).T, y.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerHead:
    """An op on each head of the last axis [heads * dim]."""

    op: Any
    dim: int = static()
    diagonal = False

    def apply(self, x):
        return self.op.apply(x.reshape(*x.shape[:-1], -1, self.dim)).reshape(x.shape)

    def inverse(self, x):
        heads = x.reshape(*x.shape[:-1], -1, self.dim)
        return self.op.inverse(heads).reshape(x.shape)

    def axes(self, name: str | None) -> PerHead:
        return dataclasses.replace(self, op=self.op.axes(None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """x M with an orthogonal matrix M [in, in]."""

    matrix: Leaf[Float[Array, "*lead in in"]]
    diagonal = False

    def apply(self, x):
        return x @ self.matrix.astype(x.dtype)

    def inverse(self, x):
        return x @ self.matrix.T.astype(x.dtype)

    def axes(self, name: str | None) -> Orthogonal:
        return Orthogonal((None, None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """x[..., order]: channels in another order [in]."""

    order: Leaf[Int[Array, "*lead in"]]
    diagonal = False

    def apply(self, x):
        return jnp.take(x, self.order, axis=-1)

    def inverse(self, x):
        return jnp.take(x, jnp.argsort(self.order), axis=-1)

    def axes(self, name: str | None) -> Permutation:
        return Permutation((None,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transformed(Preceded):
    """y = op(x) W': the input goes through ``op`` first, at run time."""

    op: Any
    inner: Any

    def materialize(self):
        """op as a matrix times W': each basis vector through ``dot``."""
        dense = base.materialize(self.inner)
        eye = jnp.eye(self.shape[0], dtype=dense.dtype)
        if dense.ndim > 2:
            return jax.vmap(lambda op, w: op.apply(eye) @ w)(self.op, dense)
        return self.op.apply(eye) @ dense

    def before(self, x):
        return self.op.apply(x)

    def refine(self, solve, stats, support=None):
        _no_support(support)
        seen = None if stats is None else stats.through(self.op)
        inner = base.refine(self.inner, solve, seen, None)
        return dataclasses.replace(self, inner=inner)

    def axes(self, names: Names) -> Transformed:
        return Transformed(self.op.axes(names[0]), base.axes(self.inner, names))


def _no_support(support) -> None:
    if support is not None:
        raise TypeError("a sparse support does not pass through an online transform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputTransformed(Wrapper):
    """y = op(x W'): the output goes through ``op`` at run time."""

    op: Any
    inner: Any

    def materialize(self):
        """Each row of W' through ``op``."""
        dense = base.materialize(self.inner)
        apply = lambda op, w: op.apply(w)  # noqa: E731
        for _ in dense.shape[:-2]:
            apply = jax.vmap(apply)
        return apply(self.op, dense)

    def dot(self, x):
        return self.op.apply(base.dot(x, self.inner))

    def dot_experts(self, x, group_sizes):
        y = base.dot(x, self.inner, group_sizes=group_sizes)
        mine = base.of_rows(self.op, x, group_sizes)
        return jax.vmap(lambda op, row: op.apply(row))(mine, y)

    def refine(self, solve, stats, support=None):
        _no_support(support)
        return super().refine(solve, stats, None)

    def axes(self, names: Names) -> OutputTransformed:
        op = self.op.axes(names[1])
        return OutputTransformed(op, base.axes(self.inner, names))
