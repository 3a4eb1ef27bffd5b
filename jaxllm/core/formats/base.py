"""Number formats: integer grids, sorted levels, and a choice of levels per block.

A format says which values a code stands for in units of a scale. ``Integer`` codes
are affine, value = scale (code - zero); ``Levels`` codes index a sorted table,
value = scale levels[code]; a ``Choice`` has several tables, one
of which each block uses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

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

    @property
    def middle(self) -> int | None:
        """The code of zero where the levels are consecutive integers, else None."""
        low = int(self.levels[0])
        whole = tuple(map(float, range(low, low + len(self.levels))))
        return -low if whole == self.levels and low <= 0 else None

    def encode(self, u, zero=None):
        table = np.asarray(self.levels, np.float32)
        between = jnp.asarray((table[1:] + table[:-1]) / 2)
        return jnp.searchsorted(between, u.astype(jnp.float32)).astype(jnp.uint8)

    def decode(self, codes, zero=None):
        return jnp.asarray(self.levels, jnp.float32)[codes]

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Choice:
    """Several tables of levels; each block's zero point is the table that it uses."""

    name: str
    tables: tuple[Levels, ...]

    def __post_init__(self):
        if len(self.tables) < 2:
            raise ValueError(f"{self.name}: a choice needs at least two tables")

    @property
    def bits(self) -> int:
        return max(t.bits for t in self.tables)

    @property
    def codes(self) -> int:
        return max(t.codes for t in self.tables)

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def largest(self) -> float:
        return max(t.largest for t in self.tables)

    def encode(self, u, zero=None):
        """The nearest codes in the tables that ``zero`` names."""
        codes = self.tables[0].encode(u)
        for i, table in enumerate(self.tables[1:], 1):
            codes = jnp.where(zero == i, table.encode(u), codes)
        return codes

    @property
    def values(self) -> np.ndarray:
        """All tables [tables, codes]; short ones repeat their last level."""
        fill = lambda v: v + v[-1:] * (self.codes - len(v))  # noqa: E731
        return np.asarray([fill(t.levels) for t in self.tables], np.float32)

    def decode(self, codes, zero=None):
        return jnp.asarray(self.values)[jnp.asarray(zero).astype(jnp.int32), codes]

    def __repr__(self) -> str:
        return self.name


Format = Integer | Levels | Choice
