"""Codes of 1 to 8 bits with a scale (and zero point) per block along the input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.formats import Choice, Format, Integer, Levels
from jaxllm.core.packing import pack, unpack
from jaxllm.core.weights.base import LEADING, Names, Weight, materialize
from jaxllm.core.weights.products import code_product, splits_evenly
from pallas_kernels.quantized_matmul import op as quantized_matmul
from pallas_kernels.table_matmul import op as table_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Weight):
    """value = scale decode(code, zero), stored [out, in] with ``in`` minor.

    ``planes`` hold the packed codes [out, bytes]; ``scale`` [out, blocks] is an array
    or itself quantized as a line [out * blocks, 1] (double quantization), and so is
    ``zero`` [out, blocks] or None. ``block`` inputs share a scale (None: the whole
    row); the last block may be short. ``stored`` codes per row differ from
    ``features`` only inside ``Sparse``, which keeps the codes of its non-zeros.
    """

    planes: Leaf[tuple[UInt8[Array, "*lead out _"], ...]]
    scale: Any
    zero: Any
    format: Format = static()
    block: int | None = static()
    features: int = static()
    dtype: str = static("float32")
    stored: int | None = static(None)

    @classmethod
    def encode(cls, values, scale, zero, format: Format, block, dtype) -> Quantized:
        """Round ``values`` [out, in] on the grid of stored ``scale`` and ``zero``."""
        features = values.shape[-1]
        wide = _spread(_plain(scale, len(values)), block, features)
        shift = _plain(zero, len(values))
        shift = None if zero is None else _spread(shift, block, features)
        codes = format.encode(values / wide, shift)
        planes = pack(codes, format.bits)
        return cls(planes, scale, zero, format, block, features, str(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.planes[0].shape[-2]

    def codes(self) -> UInt8[Array, "*lead out stored"]:
        return unpack(self.planes, self.format.bits, self.stored or self.features)

    def decode(self, codes) -> Float[Array, "*lead out in"]:
        """Values of full-width codes [out, in], float32."""
        out = self.planes[0].shape[-2]
        zero = _plain(self.zero, out)
        if zero is not None:
            zero = _spread(zero, self.block, self.features)
        scale = _plain(self.scale, out)
        scale = _spread(scale, self.block, self.features)
        return self.format.decode(codes, zero) * scale

    def materialize(self):
        dense = self.decode(self.codes())
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def dot(self, x):
        form = self.format
        if self.planes[0].ndim != 2:
            return self.expanded(x, LEADING)
        if self.stored is not None:
            return self.expanded(x, "codes of a sparse weight apart from their mask")
        if isinstance(form, Choice):
            table = self._tables(form).astype(x.dtype)
            return table_matmul(x, self.planes, table, bits=form.bits, block=self.block)
        return self._product(x)

    def dot_corrected(self, x, low_rank):
        one = self.planes[0].ndim == 2 and self.stored is None
        if one and not isinstance(self.format, Choice):
            return self._product(x, low_rank)
        return super().dot_corrected(x, low_rank)

    def _product(self, x, *low_rank):
        form = self.format
        return quantized_matmul(
            x,
            self.planes,
            *self.stored_grid(),
            *low_rank,
            bits=form.bits,
            block=self.block,
            levels=form.levels if isinstance(form, Levels) else None,
            offset=form.offset if isinstance(form, Integer) else None,
        )

    def takes_codes(self, block: int | None) -> bool:
        plain = self.stored is None and not isinstance(self.scale, Weight)
        centred = self.zero is None and _middle(self.format) is not None
        even = block is None or splits_evenly(block, self.format.bits)
        return centred and plain and block == self.block and even

    def dot_codes(self, codes, scale, out_dtype):
        middle = _middle(self.format)
        if middle is None:
            raise TypeError(f"codes of {self.format} are not integers about a zero")
        return code_product(
            codes,
            self.planes,
            scale,
            self.scale.astype(jnp.float32),
            bits=self.format.bits,
            offset=middle,
            block=self.block,
            out_dtype=out_dtype,
        )

    def _tables(self, form: Choice) -> Float[Array, "out blocks entries"]:
        """The levels that each block has chosen, times its scale."""
        out = self.planes[0].shape[-2]
        scale, chosen = _wide(self.scale, out), _wide(self.zero, out)
        levels = jnp.asarray(form.values)[chosen.astype(jnp.int32)]
        return levels * scale[..., None]

    def stored_grid(self):
        """Scale and zero (or None) [out, blocks] as stored, where kernels read that."""
        out, scale, zero = self.planes[0].shape[-2], self.scale, self.zero
        narrow = isinstance(scale, Weight) or scale.dtype == jnp.float8_e8m0fnu
        scale = _plain(scale, out) if narrow else scale
        return scale, _plain(zero, out) if isinstance(zero, Weight) else zero

    def rows(self, ids: Int[Array, "*ids"]):
        pick = lambda leaf: jnp.take(leaf, ids, axis=-2, mode="clip")  # noqa: E731
        out = self.planes[0].shape[-2]
        scale, zero = _plain(self.scale, out), _plain(self.zero, out)
        mine = dataclasses.replace(
            self,
            planes=tuple(map(pick, self.planes)),
            scale=pick(scale),
            zero=None if zero is None else pick(zero),
        )
        return mine.decode(mine.codes()).astype(self.dtype)

    def axes(self, names: Names) -> Quantized:
        inner, outer = names
        blocks = (outer, None if self.block is None else inner)
        line = lambda p: p.axes((None, None)) if isinstance(p, Weight) else blocks  # noqa: E731
        scale, zero = line(self.scale), None if self.zero is None else line(self.zero)
        planes = ((outer, inner),) * len(self.planes)
        return dataclasses.replace(self, planes=planes, scale=scale, zero=zero)


def _plain(values, out: int) -> Float[Array, "*lead out blocks"] | None:
    """Scales or zero points as float32 [out, blocks], also from a quantized line."""
    return None if values is None else _wide(values, out)


def _wide(values, out: int) -> Float[Array, "*lead out blocks"]:
    if not isinstance(values, Weight):
        return values.astype(jnp.float32)
    line = materialize(values)
    return line.reshape(*line.shape[:-2], out, -1)


def _spread(per_block, block: int | None, features: int):
    """One value per input from one per block; the last block may be short."""
    if block is None or per_block.shape[-1] == 1:
        return per_block
    return jnp.repeat(per_block, block, axis=-1)[..., :features]


def _middle(format: Format) -> int | None:
    """The code of zero where codes are integers about it, else None."""
    if isinstance(format, Integer):
        return None if format.bits == 1 else int(format.offset)
    return format.middle if isinstance(format, Levels) else None
