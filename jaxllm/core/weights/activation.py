"""Weights whose input is rounded first: W8A8, W4A8, W4A4 ..."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.core.arrays import static
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Weight, Wrapper
from jaxllm.core.weights.transformed import Transformed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationQuantized(Wrapper):
    """y = round(x) W with x rounded per token (and block of inputs) to ``format``.

    Where the weight can multiply integers and both sides are symmetric ones with
    scales of the same blocks, the product is a real int8 x int8 -> int32 one;
    otherwise the rounded values are multiplied in floating point, which gives the
    same numbers.
    """

    inner: Any
    format: ActivationFormat = static()

    @property
    def integer_product(self) -> bool:
        w, a = self.inner, self.format
        return a.integral and isinstance(w, Weight) and w.takes_codes(a.block)

    def dot(self, x):
        if not self.integer_product:
            return base.dot(self.format.round(x), self.inner)
        codes, scale = self.format.integers(x)
        return self.inner.dot_codes(codes, scale, x.dtype)


def round_input(w, format: ActivationFormat) -> Weight:
    """``w`` with its input rounded to ``format``, after what turns that input."""
    if isinstance(w, Transformed):
        return dataclasses.replace(w, inner=round_input(w.inner, format))
    if isinstance(w, ActivationQuantized):
        return dataclasses.replace(w, format=format)
    return ActivationQuantized(w, format)
