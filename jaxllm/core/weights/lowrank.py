"""Low-rank products, sums of weights, and parts that are trained."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import static
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Weight, Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """W = gain * first @ second, [in, rank] and [rank, out] (arrays or weights)."""

    first: Any
    second: Any
    gain: float = static(1.0)

    @property
    def shape(self) -> tuple[int, int]:
        return base.shape(self.first)[0], base.shape(self.second)[1]

    @property
    def dtype(self):
        return self.first.dtype

    @property
    def rank(self) -> int:
        return base.shape(self.first)[1]

    def materialize(self) -> Float[Array, "*lead in out"]:
        product = base.materialize(self.first) @ base.materialize(self.second)
        return product * jnp.asarray(self.gain, product.dtype)

    def dot(self, x):
        y = base.dot(base.dot(x, self.first), self.second)
        return y * jnp.asarray(self.gain, y.dtype)

    @property
    def factors(self) -> tuple[Array, Array] | None:
        """(L, R) with the gain in L, where both are arrays without leading axes."""
        both = (self.first, self.second)
        if any(isinstance(part, Weight) or part.ndim != 2 for part in both):
            return None
        return self.first * jnp.asarray(self.gain, self.first.dtype), self.second

    def axes(self, names: Names) -> LowRank:
        first = base.axes(self.first, (names[0], None))
        return dataclasses.replace(
            self, first=first, second=base.axes(self.second, (None, names[1]))
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Weight):
    """W = sum of terms; the first is the main one that later methods may compress."""

    terms: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return base.shape(self.terms[0])

    @property
    def dtype(self):
        return self.terms[0].dtype

    def materialize(self):
        total = base.materialize(self.terms[0])
        for term in self.terms[1:]:
            total = total + base.materialize(term).astype(total.dtype)
        return total

    def dot(self, x):
        """The main term's kernel also adds the first term of low rank, if any."""
        main, *others = self.terms
        factors = [_factors(term) for term in others]
        first = next((i for i, found in enumerate(factors) if found), None)
        if first is None or not isinstance(main, Weight):
            total = base.dot(x, main)
        else:
            total = main.dot_corrected(x, factors[first])
            del others[first]
        for term in others:
            total = total + base.dot(x, term)
        return total

    def dot_experts(self, x, group_sizes):
        terms = (base.dot(x, t, group_sizes=group_sizes) for t in self.terms)
        return functools.reduce(jnp.add, terms)

    def rows(self, ids):
        total = base.rows(self.terms[0], ids)
        for term in self.terms[1:]:
            total = total + base.rows(term, ids).astype(total.dtype)
        return total

    def refine(self, solve, stats, support=None):
        main = base.refine(self.terms[0], solve, stats, support)
        return Sum((main, *self.terms[1:]))

    def axes(self, names: Names) -> Sum:
        return Sum(tuple(base.axes(t, names) for t in self.terms))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trainable(Wrapper):
    """A part whose leaves training may change: all, or the fields that ``only`` names.

    An adapter beside a weight, or the scales of packed codes.
    """

    inner: Any
    only: tuple[str, ...] = static(())

    refine = Weight.refine  # methods leave it alone


def _factors(term) -> tuple[Array, Array] | None:
    """(L, R) of a term of low rank, trained or not."""
    inner = term.inner if isinstance(term, Trainable) else term
    return inner.factors if isinstance(inner, LowRank) else None


def merge(w):
    """The same map without parts that are trained.

    Those beside a weight are added into a dense array; a weight of which only some
    fields were trained keeps its type.
    """
    if isinstance(w, Trainable):
        return w.inner
    if isinstance(w, Sum) and any(isinstance(t, Trainable) for t in w.terms):
        return w.materialize()
    return w
