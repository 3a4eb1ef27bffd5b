"""The non-zeros of a matrix with a bit mask of where they are."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.formats import Integer
from jaxllm.core.packing import pack, unpack
from jaxllm.core.weights.base import LEADING, Names, Weight
from jaxllm.core.weights.quantized import Quantized
from pallas_kernels.nm_matmul import op as nm_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Weight):
    """A bit mask [out, in / 8] and the kept values in its order.

    ``values`` is [out, kept] when every row keeps the same number (N:M, per-row
    pruning), or [1, kept] for a mask with one total; or a ``Quantized`` whose codes
    are so laid out while its scales keep their dense blocks.
    """

    mask: Leaf[UInt8[Array, "*lead out _"]]
    values: Any
    features: int = static()
    dtype: str = static("float32")
    pattern: str = static("mask")

    @classmethod
    def of(cls, dense, support: Bool[Array, "*lead in out"], kept: int, pattern: str):
        """Keep the entries of ``dense`` [in, out] in ``support``.

        ``kept`` counts them per output row, or in the whole matrix when ``pattern``
        is ``mask``; entries beyond it would be lost, missing ones are padded. A group
        of an ``n:m`` pattern that keeps fewer than n stores zeros for the rest.
        """
        flags = jnp.swapaxes(support, -1, -2)
        values = jnp.where(flags, jnp.swapaxes(dense, -1, -2), 0)
        features = flags.shape[-1]
        if groups := _groups(pattern):
            flags = _filled(flags, *groups)
        (mask,) = pack(flags.astype(jnp.uint8), 1)
        whole = pattern == "mask"
        kept_values = _compress(_lines(values, whole), _lines(flags, whole), kept)
        return cls(mask, kept_values, features, str(dense.dtype), pattern)

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.mask.shape[-2]

    @property
    def support(self) -> Bool[Array, "*lead in out"]:
        """Where the entries are; zeros that only fill a group are outside."""
        flags = self._flags()
        if _groups(self.pattern) and not isinstance(self.values, Quantized):
            flags &= _expand(self.values, flags) != 0
        return jnp.swapaxes(flags, -1, -2)

    def _flags(self):
        return unpack((self.mask,), 1, self.features).astype(bool)

    def full_codes(self) -> UInt8[Array, "*lead out in"]:
        """Codes of quantized values at their places; arbitrary off the mask."""
        return _expand(self.values.codes(), self._flags())

    def materialize(self):
        flags = self._flags()
        packed = isinstance(self.values, Quantized)
        stored = self.values.codes() if packed else self.values
        dense = _expand(stored, flags)
        dense = self.values.decode(dense) if packed else dense
        dense = jnp.where(flags, dense, 0)
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def dot(self, x):
        why = self._unreadable()
        return self.expanded(x, why) if why else self._product(x)

    def dot_corrected(self, x, low_rank):
        if self._unreadable():
            return super().dot_corrected(x, low_rank)
        return self._product(x, low_rank)

    def _product(self, x, *low_rank):
        groups, values = _groups(self.pattern), self.values
        assert groups is not None
        n, m = groups
        if not isinstance(values, Quantized):
            return nm_matmul(x, self.mask, values, None, None, *low_rank, n=n, m=m)
        stored = dict(n=n, m=m, bits=values.format.bits, block=values.block)
        grid = values.stored_grid()
        return nm_matmul(x, self.mask, values.planes, *grid, *low_rank, **stored)

    def _unreadable(self) -> str | None:
        """Why ``nm_matmul`` cannot read this weight."""
        values = self.values
        if _groups(self.pattern) is None:
            return f"kept entries of pattern {self.pattern!r} are not in groups"
        if self.mask.ndim != 2:
            return LEADING
        if not isinstance(values, Quantized):
            return None
        grid = values.format
        usual = isinstance(grid, Integer) and grid.bits > 1
        return None if usual else f"kept entries as codes of {grid}"

    def refine(self, solve, stats, support=None):
        """Solve the values on this mask; a quantized result keeps only its codes."""
        if isinstance(self.values, Quantized):
            return super().refine(solve, stats, support)
        mine = self.support if support is None else self.support & support
        made = solve(self.materialize(), stats, mine)
        kept = self.values.shape[-1]
        if isinstance(made, Quantized):
            whole = self.values.shape[-2] == 1 and self.shape[1] > 1
            flags = self._flags()
            codes = _compress(_lines(made.codes(), whole), _lines(flags, whole), kept)
            planes = pack(codes, made.format.bits)
            made = dataclasses.replace(made, planes=planes, stored=kept)
            return dataclasses.replace(self, values=made)
        if isinstance(made, Weight):
            name = type(made).__name__
            raise TypeError(f"a {name} cannot be stored on a sparse mask")
        return Sparse.of(made, mine, kept, self.pattern)

    def axes(self, names: Names) -> Sparse:
        """A mask with one total cannot be split: its values have no axis names."""
        outer = names[1]
        whole = self.pattern == "mask"
        mask = (None, None) if whole else (outer, None)
        line = (None, None) if whole else (outer, None)
        values = self.values
        if isinstance(values, Quantized):
            values = values.axes((None, None if whole else outer))
            values = dataclasses.replace(values, planes=(line,) * len(values.planes))
        else:
            values = line
        return dataclasses.replace(self, mask=mask, values=values)


def _groups(pattern: str) -> tuple[int, int] | None:
    """(n, m) of an ``n:m`` pattern that leaves something out."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    return (n, m) if 0 < n < m else None


def _filled(flags, n: int, m: int):
    """Exactly n of every m inputs: those flagged come first, then the first others."""
    grouped = flags.reshape(*flags.shape[:-1], -1, m)
    order = jnp.argsort(~grouped, axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < n).reshape(flags.shape)


def _lines(rows, whole: bool):
    """[out, in] as it is, or as one line [1, out * in]."""
    return rows.reshape(*rows.shape[:-2], 1, -1) if whole else rows


def _compress(values, flags, kept: int):
    """The flagged entries of each line in order, padded with zeros to ``kept``."""
    index = jnp.cumsum(flags, -1) - 1
    slot = jnp.where(flags, index, kept)
    lines = values.reshape(-1, values.shape[-1])
    slots = slot.reshape(lines.shape)
    row = jnp.arange(len(lines))[:, None]
    blank = jnp.zeros((len(lines), kept), values.dtype)
    out = blank.at[row, slots].set(lines, mode="drop")
    return out.reshape(*values.shape[:-1], kept)


def _expand(stored, flags):
    """Entries back at their places; what is not flagged is arbitrary."""
    count = stored.shape[-2]
    lines = flags.reshape(*flags.shape[:-2], count, -1)
    index = jnp.clip(jnp.cumsum(lines, -1) - 1, 0, stored.shape[-1] - 1)
    return jnp.take_along_axis(stored, index, -1).reshape(flags.shape)


def kept_per_row(features: int, density: float) -> int:
    """Non-zeros that a row keeps at a density."""
    return max(1, math.floor(features * density + 0.5))
