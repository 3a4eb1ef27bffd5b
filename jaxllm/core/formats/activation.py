"""Rounding of activations along their last axis."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxllm.core.arrays import Leaf, as_stored, static, straight_through, to_rank
from jaxllm.core.formats.base import TINY, Integer, Levels
from jaxllm.core.packing import pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packed codes of ``width`` activations, their scale and zero point (or None)."""

    codes: Leaf[tuple[Array, ...]]
    scale: Leaf[Array]
    zero: Leaf[Array | None]
    width: int = static()


@dataclasses.dataclass(frozen=True)
class ActivationFormat:
    """Rounding of activations along the last axis: one scale per token and block.

    ``symmetric`` uses absmax, otherwise min and max; ``clip`` shrinks the range;
    ``block`` None means the whole last axis, a last block may be short; ``element``
    replaces the integers of ``bits`` by other levels (``float_format(4, 3)``).
    """

    bits: int | Any  # text and files give anything: checked below
    symmetric: bool = True
    block: int | None = None
    clip: float = 1.0
    element: Levels | None = None

    def __post_init__(self):
        Integer(self.bits)
        if self.element is not None and self.element.bits != self.bits:
            raise ValueError(f"{self.element} is no format of {self.bits} bits")
        if self.element is not None and not self.symmetric:
            raise ValueError(f"{self.element} has no zero point: use symmetric")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip {self.clip}; accepted: 0 < clip <= 1")

    @property
    def format(self) -> Integer | Levels:
        return self.element or Integer(self.bits, self.symmetric)

    @property
    def integral(self) -> bool:
        """Whether ``integers`` gives the same rounding as ``round``."""
        return self.symmetric and self.element is None

    def _blocks(self, x):
        """[..., blocks, block], a short last block filled with zeros."""
        size = self.block or x.shape[-1]
        sides = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
        return jnp.pad(x, sides).reshape(*x.shape[:-1], -1, size)

    def fixed(
        self, x: Float[Array, "... width"], scale: Float[Array, "blocks"], zero=None
    ) -> Float[Array, "... width"]:
        """``x`` on the grid of scales and zero points that are given; same dtype.

        ``scale`` [blocks] and ``zero`` [blocks] (None where ``symmetric``) serve all
        tokens, and what lies beyond their range becomes its end. Gradients pass
        rounding straight, so that scale and zero point have those of s round(x / s)
        within the range and those of its ends beyond (arXiv:1902.08153, eq. 3).
        """
        blocks = self._blocks(x.astype(jnp.float32))
        scale = to_rank(scale.astype(jnp.float32)[:, None], blocks.ndim)
        if zero is not None:
            zero = to_rank(zero.astype(jnp.float32)[:, None], blocks.ndim)
        u = blocks / scale
        values = self.format.decode(self.format.encode(u, zero), zero)
        inside = jnp.clip(u, *self._ends(zero))
        smooth = inside - jax.lax.stop_gradient(inside)  # zero, with a gradient
        values = jax.lax.stop_gradient(values) + smooth
        return _joined(values * scale, x.shape[-1]).astype(x.dtype)

    def _ends(self, zero):
        """The least and the largest value in units of the scale."""
        if self.element is not None:
            return self.element.levels[0], self.element.levels[-1]
        shift = Integer(self.bits).offset if zero is None else zero
        return 0.0 - shift, 2.0**self.bits - 1.0 - shift

    def fixed_integers(
        self, x: Float[Array, "... width"], scale: Float[Array, "blocks"]
    ) -> Int8[Array, "... width"]:
        """Signed codes of ``x`` as ``fixed`` uses them."""
        if not self.integral:
            raise ValueError(f"{self} is no symmetric integer format")
        blocks = self._blocks(x.astype(jnp.float32))
        scale = to_rank(scale.astype(jnp.float32)[:, None], blocks.ndim)
        return self._signed(blocks / scale, x.shape[-1])

    def _signed(self, u, width: int) -> Int8[Array, "... width"]:
        """Integers about zero of blocks in units of the scale."""
        codes = self.format.encode(u).astype(jnp.int32)
        return _joined((codes - 2 ** (self.bits - 1)).astype(jnp.int8), width)

    def _grid(self, x):
        blocks = self._blocks(x.astype(jnp.float32))
        if self.symmetric:
            peak = jnp.abs(blocks).max(-1, keepdims=True) * self.clip
            return blocks, jnp.maximum(peak / self.format.largest, TINY), None
        low = jnp.minimum(blocks.min(-1, keepdims=True), 0) * self.clip
        high = jnp.maximum(blocks.max(-1, keepdims=True), 0) * self.clip
        scale = jnp.maximum((high - low) / (self.format.codes - 1), TINY)
        return blocks, scale, jnp.round(-low / scale)

    def encode(self, x: Float[Array, "... width"]) -> Encoded:
        """Packed codes of ``x``; scales are bfloat16, zero points uint8."""
        blocks, scale, zero = self._grid(x)
        stored = scale.astype(jnp.bfloat16)
        codes = self.format.encode(blocks / stored.astype(jnp.float32), zero)
        zero = None if zero is None else zero[..., 0].astype(jnp.uint8)
        width = x.shape[-1]
        codes = pack(_joined(codes, width), self.bits)
        return Encoded(codes, stored[..., 0], zero, width)

    def decode(self, encoded: Encoded) -> Float[Array, "... width"]:
        """The float32 values that ``round`` gives."""
        codes = unpack(encoded.codes, self.bits, encoded.width)
        zero = encoded.zero
        zero = None if zero is None else zero[..., None].astype(jnp.float32)
        values = self.format.decode(self._blocks(codes), zero)
        scale = encoded.scale[..., None].astype(jnp.float32)
        return _joined(values * scale, encoded.width)

    def round(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """The nearest representable values, without packing; same dtype."""
        blocks, scale, zero = self._grid(x)
        scale = as_stored(scale)
        codes = self.format.encode(blocks / scale, zero)
        values = self.format.decode(codes, zero) * scale
        return _joined(values, x.shape[-1]).astype(x.dtype)

    def integers(
        self, x: Float[Array, "... width"]
    ) -> tuple[Int8[Array, "... width"], Float[Array, "... blocks"]]:
        """Signed codes and the scales of their blocks, as ``round`` uses them."""
        if not self.integral:
            raise ValueError(f"{self} is no symmetric integer format")
        blocks, scale, _ = self._grid(x)
        scale = as_stored(scale)
        return self._signed(blocks / scale, x.shape[-1]), scale[..., 0]


@dataclasses.dataclass(frozen=True)
class Log2:
    """Numbers of [0, 1] as powers of two: 2^-k with k = 0 ... 2^bits - 1, else zero.

    k is -log2 x, rounded; what is below the last power becomes zero, a code more, as
    in the code of FQ-ViT (arXiv:2111.13824); its paper has the last power there. No
    range is needed, and a product with 2^-k is a shift. Gradients pass rounding
    straight.
    """

    bits: int

    def __post_init__(self):
        Integer(self.bits)

    def round(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest power, in powers; same dtype."""
        k = jnp.round(-jnp.log2(x.astype(jnp.float32)))
        power = jnp.where(k < 2**self.bits, jnp.exp2(-k), 0).astype(x.dtype)
        return straight_through(power, x)


def _joined(blocks, width: int):
    """[..., width] from [..., blocks, block]."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :width]
