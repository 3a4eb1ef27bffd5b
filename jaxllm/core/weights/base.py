"""The protocol of weight types, and the functions that take arrays and types alike."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels import fall_back

Solve = Callable[..., Any]
Names = tuple[str | None, str | None]  # logical axes of [in, out]
LEADING = "no kernel takes packed weights with leading axes"


class Weight(abc.ABC):
    """A linear map y = x W that is stored in some other form.

    Subclasses are frozen dataclasses registered as pytrees. ``shape`` and ``dtype``
    are logical: [in, out] without leading axes, and what ``materialize`` returns.
    """

    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Logical [in, out]."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "*lead in out"]:
        """The dense array that this weight stands for."""

    @abc.abstractmethod
    def axes(self, names: Names):
        """The same type with, for each leaf, its logical axis names (a tuple)."""

    def dot(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """x W in the dtype of x; a kernel where the type and the device have one."""
        return self.expanded(x, "no kernel reads how it is stored")

    def dot_corrected(self, x: Float[Array, "*batch in"], low_rank):
        """x W + (x L) R of the factors (L, R): by one kernel where the type has it."""
        left, right = low_rank
        return self.dot(x) + dot(dot(x, left), right)

    def expanded(self, x: Float[Array, "*batch in"], why: str):
        """x W with the dense array; says ``why`` no kernel serves (``fall_back``)."""
        fall_back(type(self).__name__, why)
        return x @ self.materialize().astype(x.dtype)

    def dot_experts(self, x: Float[Array, "tokens in"], group_sizes):
        """``dot`` of experts (a leading axis of all leaves) and rows sorted by them."""
        fall_back(type(self).__name__, "no kernel multiplies packed experts")
        return jax.lax.ragged_dot(x, self.materialize().astype(x.dtype), group_sizes)

    def rows(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids in"]:
        """The columns W[:, ids] as rows: embeddings of a table [width, vocabulary]."""
        return rows(self.materialize(), ids)

    def takes_codes(self, block: int | None) -> bool:
        """Whether ``dot_codes`` takes integers with one scale per ``block`` inputs."""
        return False

    def dot_codes(
        self,
        codes: Int8[Array, "*batch in"],
        scale: Float[Array, "*batch blocks"],
        out_dtype,
    ) -> Float[Array, "*batch out"]:
        """(codes scale) W by an integer product, where ``takes_codes`` says so."""
        raise TypeError(f"{type(self).__name__} multiplies no integer codes")

    def refine(self, solve: Solve, stats, support=None):
        """Let ``solve(dense, stats, support)`` replace the part that is still dense.

        ``support`` (bool [in, out] or None) marks the entries that may be non-zero.
        A type without such a part refuses, naming itself.
        """
        raise TypeError(
            f"{type(self).__name__} has no dense part left to compress; "
            "put that method before the one that made it"
        )

    @property
    def leaves(self) -> list[Array]:
        return jax.tree.leaves(self)


class Wrapper(Weight):
    """A weight around another one, ``inner``, whose dense array it has."""

    inner: Any

    @property
    def shape(self) -> tuple[int, int]:
        return shape(self.inner)

    @property
    def dtype(self):
        return self.inner.dtype

    def materialize(self):
        return materialize(self.inner)

    def dot(self, x):
        return dot(x, self.inner)

    def dot_experts(self, x, group_sizes):
        return dot(x, self.inner, group_sizes=group_sizes)

    def refine(self, solve: Solve, stats, support=None):
        return self._around(refine(self.inner, solve, stats, support))

    def axes(self, names: Names):
        return self._around(axes(self.inner, names))

    def _around(self, inner):
        mine: Any = self  # subclasses are dataclasses
        return dataclasses.replace(mine, inner=inner)


class Preceded(Wrapper):
    """y = before(x) W: something happens to each input first."""

    @abc.abstractmethod
    def before(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """What reaches the inner weight; reads no leaf of that."""

    def dot(self, x):
        return dot(self.before(x), self.inner)

    def dot_experts(self, x, group_sizes):
        """Each row passes what stands before its own expert."""
        mine = of_rows(self._around(None), x, group_sizes)
        x = jax.vmap(type(self).before)(mine, x)
        return dot(x, self.inner, group_sizes=group_sizes)


def of_rows(tree, x: Float[Array, "tokens in"], group_sizes):
    """Leaves [experts, ...] as [tokens, ...]: those of the expert of each row of x."""
    experts = jnp.arange(len(group_sizes))
    owner = jnp.repeat(experts, group_sizes, total_repeat_length=len(x))
    return jax.tree.map(lambda leaf: leaf[owner], tree)


def axes(w, names: Names):
    """Logical axis names of an array or a weight type."""
    return w.axes(names) if isinstance(w, Weight) else names


def shape(w) -> tuple[int, int]:
    """Logical [in, out] of one map."""
    rows, out = w.shape[-2:]
    return rows, out


def materialize(w) -> Float[Array, "*lead in out"]:
    """The dense array of an array or a weight type."""
    return w.materialize() if isinstance(w, Weight) else w


def dot(x, w, *, group_sizes=None):
    """y = x W, [..., in] to [..., out], in the dtype of ``x``.

    With ``group_sizes`` [experts], ``w`` has a leading expert axis and consecutive
    rows of ``x`` [tokens, in] belong to expert 0, 1, ...
    """
    if group_sizes is not None:
        if isinstance(w, Weight):
            return w.dot_experts(x, group_sizes)
        return jax.lax.ragged_dot(x, w.astype(x.dtype), group_sizes)
    if isinstance(w, Weight):
        return w.dot(x)
    return x @ w.astype(x.dtype)


def rows(w, ids):
    """Embedding lookup: column ``ids`` of a table [width, vocabulary], as rows."""
    if isinstance(w, Weight):
        return w.rows(ids)
    return jnp.moveaxis(jnp.take(w, ids, axis=1, mode="clip"), 0, -1)


def refine(w, solve: Solve, stats, support=None):
    """Apply a per-layer solver to the dense part of an array or a weight type."""
    if isinstance(w, Weight):
        return w.refine(solve, stats, support)
    return solve(w, stats, support)


def compressed(w) -> bool:
    return isinstance(w, Weight)


def nbytes(w) -> int:
    """Bytes of the stored leaves of a weight (or of any pytree); never a formula."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))


def size(w) -> int:
    """Number of logical entries, leading axes included."""
    if not isinstance(w, Weight):
        return int(w.size)
    dense = jax.eval_shape(materialize, w)
    return int(dense.size)
