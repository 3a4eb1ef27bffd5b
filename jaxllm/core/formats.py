"""Number formats: integer grids and sorted levels, and rounding of activations.

A format says which values a code stands for in units of a scale. ``Integer`` codes
are affine, value = scale (code - zero); ``Levels`` codes index a sorted table,
value = scale levels[code].
"""

from __future__ import annotations

import dataclasses
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxllm.core.arrays import Leaf
from jaxllm.core.packing import pack, unpack

TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Integer:
    """b-bit integers, 1 <= b <= 8.

    Symmetric codes stand for -2^(b-1) .. 2^(b-1) - 1 (for one bit: -1/2 and 1/2);
    asymmetric ones take a zero point per block.
    """

    bits: int | Any  # text and files give anything: checked below
    symmetric: bool = False

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"integer format of {self.bits!r} bits; accepted: 1 to 8")

    @property
    def codes(self) -> int:
        return 2**self.bits

    @property
    def offset(self) -> float:
        """The code that stands for zero in the symmetric form."""
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    @property
    def largest(self) -> float:
        """Largest magnitude that both signs of the symmetric form reach."""
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1) - 1)

    def encode(self, u: Float[Array, "..."], zero=None) -> UInt8[Array, "..."]:
        """The nearest codes of values ``u`` in units of the scale."""
        shift = self.offset if zero is None else zero
        return jnp.clip(jnp.round(u + shift), 0, self.codes - 1).astype(jnp.uint8)

    def decode(self, codes, zero=None) -> Float[Array, "..."]:
        shift = self.offset if zero is None else zero
        return codes.astype(jnp.float32) - shift


@dataclasses.dataclass(frozen=True)
class Levels:
    """A fixed table of 2^bits (or fewer) sorted values."""

    name: str
    levels: tuple[float, ...]

    def __post_init__(self):
        if not 2 <= len(self.levels) <= 256 or list(self.levels) != sorted(self.levels):
            raise ValueError(f"{self.name}: needs 2 to 256 ascending levels")

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def codes(self) -> int:
        return len(self.levels)

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def largest(self) -> float:
        return max(abs(v) for v in self.levels)

    def encode(self, u, zero=None):
        table = np.asarray(self.levels, np.float32)
        between = jnp.asarray((table[1:] + table[:-1]) / 2)
        return jnp.searchsorted(between, u.astype(jnp.float32)).astype(jnp.uint8)

    def decode(self, codes, zero=None):
        return jnp.asarray(self.levels, jnp.float32)[codes]

    def __repr__(self) -> str:
        return self.name


Format = Integer | Levels


def float_format(exponent: int, mantissa: int) -> Levels:
    """E{exponent}M{mantissa} with subnormals; E4M3 and E5M2 without inf and nan."""
    known = {(4, 3): ml_dtypes.float8_e4m3fn, (5, 2): ml_dtypes.float8_e5m2}
    if (exponent, mantissa) in known:
        dtype = known[exponent, mantissa]
        values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
        values = np.unique(values[np.isfinite(values)])
    else:
        bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
        e, f = np.meshgrid(np.arange(2**exponent), np.arange(steps), indexing="ij")
        normal = (1 + f / steps) * 2.0 ** (e - bias)
        half = np.where(e == 0, f / steps * 2.0 ** (1 - bias), normal).ravel()
        values = np.unique(np.concatenate((-half, half)))
    return Levels(f"e{exponent}m{mantissa}", tuple(map(float, values)))


def normal_float(bits: int) -> Levels:
    """NormalFloat (QLoRA, arXiv:2305.14314, section 3): normal quantiles, exact zero.

    2^(bits-1) quantiles for the negative half, one more for the positive, sharing
    zero, scaled to [-1, 1]; the tail offset is that of the paper's code for any bits:
    the mean of 1 - 1/(2 2^b - 2) and 1 - 1/(2 2^b).
    """
    count = 2 ** (bits - 1)
    tail = 1 - (1 / (4 * count - 2) + 1 / (4 * count)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(tail, 0.5, count + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(tail, 0.5, count)[:-1]]
    values = np.sort(np.array([*negative, 0.0, *positive]))
    return Levels(f"nf{bits}", tuple(map(float, values / np.abs(values).max())))


def parse_format(name: str | Format) -> Format:
    """``int4``, ``sint8`` (symmetric), ``nf4``, ``e2m1``, ``fp8`` ... by name."""
    if not isinstance(name, str):
        return name
    alias = {"fp8": "e4m3", "fp4": "e2m1", "fp6": "e3m2"}.get(name, name)
    if alias[:3] == "int" and alias[3:].isdigit():
        return Integer(int(alias[3:]))
    if alias[:4] == "sint" and alias[4:].isdigit():
        return Integer(int(alias[4:]), symmetric=True)
    if alias[:2] == "nf" and alias[2:].isdigit():
        return normal_float(int(alias[2:]))
    if len(alias) == 4 and alias[0] == "e" and alias[2] == "m":
        return float_format(int(alias[1]), int(alias[3]))
    accepted = "int1..int8, sint1..sint8, nf2..nf8, eXmY, fp4, fp6, fp8"
    raise ValueError(f"number format {name!r}; accepted: {accepted}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packed codes of activations with their scale and zero point (or None)."""

    codes: Leaf[tuple[Array, ...]]
    scale: Leaf[Array]
    zero: Leaf[Array | None]


@dataclasses.dataclass(frozen=True)
class ActivationFormat:
    """Rounding of activations along the last axis: one scale per token and block.

    ``symmetric`` uses absmax, otherwise min and max; ``clip`` shrinks the range;
    ``block`` None means the whole last axis.
    """

    bits: int | Any  # text and files give anything: checked below
    symmetric: bool = True
    block: int | None = None
    clip: float = 1.0

    def __post_init__(self):
        Integer(self.bits)
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip {self.clip}; accepted: 0 < clip <= 1")

    @property
    def format(self) -> Integer:
        return Integer(self.bits, self.symmetric)

    def _grid(self, x):
        blocks = x.astype(jnp.float32).reshape(
            *x.shape[:-1], -1, self.block or x.shape[-1]
        )
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
        return Encoded(pack(codes.reshape(x.shape), self.bits), stored[..., 0], zero)

    def decode(self, encoded: Encoded) -> Float[Array, "... width"]:
        width = sum(p.shape[-1] for p in encoded.codes[:1]) * 8
        width //= 1 << (self.bits.bit_length() - 1)
        codes = unpack(encoded.codes, self.bits, width)
        blocks = codes.reshape(*codes.shape[:-1], encoded.scale.shape[-1], -1)
        zero = encoded.zero
        zero = None if zero is None else zero[..., None].astype(jnp.float32)
        values = self.format.decode(blocks, zero)
        return (values * encoded.scale[..., None].astype(jnp.float32)).reshape(
            codes.shape
        )

    def round(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """The nearest representable values, without packing; same dtype."""
        blocks, scale, zero = self._grid(x)
        scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
        codes = self.format.encode(blocks / scale, zero)
        values = self.format.decode(codes, zero) * scale
        return values.reshape(x.shape).astype(x.dtype)
