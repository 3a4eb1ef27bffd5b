"""Weights whose input is rounded first: W8A8, W4A8, W4A4 ..."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from jaxllm.core.arrays import Leaf, static, to_rank
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Names, Preceded, Weight
from jaxllm.core.weights.transformed import Transformed


class RoundedInput(Preceded):
    """y = round(x) W.

    Where the weight can multiply integers and both sides are symmetric ones with
    scales of the same blocks, the product is a real int8 x int8 -> int32 one;
    otherwise the rounded values are multiplied in floating point, which gives the
    same numbers.
    """

    format: ActivationFormat

    @abc.abstractmethod
    def integers(
        self, x: Float[Array, "*batch in"]
    ) -> tuple[Int8[Array, "*batch in"], Float[Array, "*batch blocks"]]:
        """``before(x)`` as signed codes with the scales of their blocks."""

    @property
    def integer_product(self) -> bool:
        w, a = self.inner, self.format
        return a.integral and isinstance(w, Weight) and w.takes_codes(a.block)

    def dot(self, x):
        if not self.integer_product:
            return super().dot(x)
        codes, scale = self.integers(x)
        return self.inner.dot_codes(codes, scale, x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationQuantized(RoundedInput):
    """y = round(x) W with x rounded per token (and block of inputs) to ``format``."""

    inner: Any
    format: ActivationFormat = static()

    def before(self, x):
        return self.format.round(x)

    def integers(self, x):
        return self.format.integers(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaticInput(RoundedInput):
    """y = round(x) W with x rounded to one range for all tokens, known beforehand.

    ``scale`` and ``zero`` [blocks] are leaves: stored, and learnable where ``inner`` is
    an array, since gradients pass rounding straight. ``zero`` is None where ``format``
    is symmetric; its ``block`` None gives the whole input one range.
    """

    inner: Any
    scale: Leaf[Float[Array, "*lead blocks"]]
    zero: Leaf[Float[Array, "*lead blocks"] | UInt8[Array, "*lead blocks"] | None]
    format: ActivationFormat = static()

    def before(self, x):
        return self.format.fixed(x, self.scale, self.zero)

    def integers(self, x):
        scale = to_rank(self.scale.astype(jnp.float32), x.ndim)
        scale = jnp.broadcast_to(scale, (*x.shape[:-1], scale.shape[-1]))
        return self.format.fixed_integers(x, self.scale), scale

    def axes(self, names: Names) -> StaticInput:
        zero = None if self.zero is None else (None,)
        inner = base.axes(self.inner, names)
        return dataclasses.replace(self, inner=inner, scale=(None,), zero=zero)


def round_input(w, format: ActivationFormat) -> Weight:
    """``w`` with its input rounded to ``format``, after what turns that input."""
    return around_input(w, lambda bare: ActivationQuantized(bare, format))


def around_input(w, wrap: Callable[[Any], Weight]) -> Weight:
    """``w`` with ``wrap`` around what reads its input last, in place of a rounding.

    Online transforms of the input stay outside.
    """
    if isinstance(w, Transformed):
        return dataclasses.replace(w, inner=around_input(w.inner, wrap))
    return wrap(w.inner if isinstance(w, RoundedInput) else w)
