"""Weights whose input is rounded first: W8A8, W4A8, W4A4 ..."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import static
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.weights import base
from jaxllm.core.weights.base import Weight, Wrapper
from jaxllm.core.weights.quantized import Quantized
from pallas_kernels.plane_product import op as plane_product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationQuantized(Wrapper):
    """y = round(x) W with x rounded per token to ``format``.

    Where both sides are symmetric integers and the weight has one scale per output,
    the product is a real int8 x int8 -> int32 one; otherwise the rounded values are
    multiplied in floating point, which gives the same numbers.
    """

    inner: Any
    format: ActivationFormat = static()

    @property
    def integer_product(self) -> bool:
        w, a = self.inner, self.format
        return (
            isinstance(w, Quantized)
            and isinstance(w.format, Integer)
            and w.zero is None
            and w.block is None
            and not isinstance(w.scale, Weight)
            and w.format.bits > 1
            and a.symmetric
            and a.element is None
            and a.block is None
        )

    def dot(self, x):
        if not self.integer_product:
            return base.dot(self.format.round(x), self.inner)
        grid, w = self.format.format, self.inner
        assert isinstance(grid, Integer)  # no element: ``integer_product``
        _, scale, _ = self.format._grid(x)
        scale = scale[..., 0].astype(jnp.bfloat16).astype(jnp.float32)
        codes = grid.encode(x.astype(jnp.float32) / scale)
        left = (codes.astype(jnp.int32) - int(grid.offset)).astype(jnp.int8)
        return plane_product(
            left,
            w.planes,
            scale,
            w.scale.astype(jnp.float32),
            bits=w.format.bits,
            offset=int(w.format.offset),
            out_dtype=x.dtype,
        )
