"""Codes whose scales have two levels: an integer per group, a float per output."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.packing import Planes, pack, unpack
from jaxllm.core.weights.base import Names, Weight
from pallas_kernels.quantized_matmul import op as quantized_matmul
from pallas_kernels.two_level_matmul import op as two_level_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoLevel(Weight):
    """value = scale (code - zero) group_scale, stored [out, in] with ``in`` minor.

    ``group_scale`` and ``zero`` [out, groups] are integers such that
    (code - zero) group_scale fits into int8: within an output the products with int8
    inputs are summed as integers. ``scale`` [out, 1] is one float per output;
    ``block`` inputs share the integers (the last group may be short).
    """

    planes: Leaf[Planes]
    group_scale: Leaf[UInt8[Array, "*lead out groups"]]
    zero: Leaf[UInt8[Array, "*lead out groups"]]
    scale: Leaf[Float[Array, "*lead out 1"]]
    bits: int = static()
    block: int = static()
    features: int = static()
    dtype: str = static("float32")

    @classmethod
    def of(cls, codes, group_scale, zero, scale, bits, block, dtype) -> TwoLevel:
        """From codes [out, in] with integers [out, groups] and scale [out]."""
        small = lambda x: x.astype(jnp.uint8)  # noqa: E731
        leaves = small(group_scale), small(zero), scale[:, None].astype(jnp.bfloat16)
        packed = pack(small(codes), bits)
        return cls(packed, *leaves, bits, block, codes.shape[-1], str(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.planes[0].shape[-2]

    def integers(self) -> Int8[Array, "*lead out in"]:
        """(code - zero) group_scale: the weight as int8 with one scale per output."""
        wide = lambda x: jnp.repeat(x.astype(jnp.int32), self.block, -1)  # noqa: E731
        codes = unpack(self.planes, self.bits, self.features).astype(jnp.int32)
        shift, gain = (
            wide(x)[..., : self.features] for x in (self.zero, self.group_scale)
        )
        return ((codes - shift) * gain).astype(jnp.int8)

    def materialize(self) -> Float[Array, "*lead in out"]:
        return jnp.swapaxes(self._by_output(), -1, -2)

    def _by_output(self) -> Float[Array, "*lead out in"]:
        dense = self.integers().astype(jnp.float32) * self.scale.astype(jnp.float32)
        return dense.astype(self.dtype)

    def dot(self, x):
        if self.scale.ndim > 2:
            return super().dot(x)
        scale = self.group_scale.astype(jnp.float32) * self.scale.astype(jnp.float32)
        return quantized_matmul(
            x,
            self.planes,
            scale,
            self.zero,
            bits=self.bits,
            block=self.block,
            offset=float(2 ** (self.bits - 1)),
        )

    def takes_codes(self, block: int | None) -> bool:
        return block is None

    def dot_codes(self, codes, scale, out_dtype):
        return two_level_matmul(
            codes,
            self.planes,
            self.group_scale,
            self.zero,
            scale,
            self.scale.astype(jnp.float32),
            bits=self.bits,
            block=self.block,
            out_dtype=out_dtype,
        )

    def rows(self, ids):
        pick = lambda leaf: jnp.take(leaf, ids, axis=-2, mode="clip")  # noqa: E731
        return jax.tree.map(pick, self)._by_output()

    def axes(self, names: Names) -> TwoLevel:
        inner, outer = names
        return dataclasses.replace(
            self,
            planes=((outer, inner),) * len(self.planes),
            group_scale=(outer, inner),
            zero=(outer, inner),
            scale=(outer, None),
        )
