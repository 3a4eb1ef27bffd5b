"""What is decided before a product on Hopper runs: tiles, streams, blocks of scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import hopper
from pallas_kernels import tuning as tables
from pallas_kernels.hopper import LANES


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tiles: rows of x, inputs of a step, depth of the ring, splits of the inputs.

    ``splits`` blocks share an output tile; their float32 parts are summed outside,
    where XLA fuses the sum with what follows. ``sums``: scales multiply each block's
    sums in float32 (few rows), else the weights in bfloat16 (many rows).
    """

    rows: int
    inputs: int
    stages: int = 4
    splits: int = 1
    warpgroups: int = 2
    sums: bool = True


class Tiles:
    """What the tiles of a plan are: of so many outputs, and written how."""

    tuning: Tuning
    narrow: bool  # the result is bfloat16

    @property
    def tile(self) -> int:
        return LANES * self.tuning.warpgroups

    @property
    def partial(self) -> bool:
        """The kernel writes float32 out^T for each split."""
        return self.tuning.splits > 1 or not self.narrow


@dataclasses.dataclass(frozen=True)
class Plan(Tiles):
    """What is static about a product; ``block`` inputs share scales (None: all)."""

    rows: int
    inputs: int
    outputs: int
    block: int | None
    narrow: bool  # the result is bfloat16
    tuning: Tuning

    @property
    def steps(self) -> int:
        return self.inputs // self.tuning.inputs // self.tuning.splits

    @property
    def groups(self) -> int:
        """Blocks of scales in a step (one where a block spans steps)."""
        return 1 if self.block is None else max(1, self.tuning.inputs // self.block)

    def group(self, step, g: int):
        """The block of scales that group ``g`` of a step belongs to."""
        if self.block is None:
            return 0
        if self.block > self.tuning.inputs:
            return step // (self.block // self.tuning.inputs)
        return step * self.groups + g


class Stream(NamedTuple):
    """An operand that passes through the ring, ``columns`` of it a step.

    ``width`` bytes are a swizzled row of a tile; None keeps its rows as they are. The
    copy engine wants rows of 16n bytes: the array has ``folded`` rows of others in each
    of its own, and a tile has them apart, [folded, rows / folded, columns].
    """

    array: Any
    columns: int
    width: int | None
    folded: int | None = None

    @property
    def copies(self) -> int:
        """That fill a tile."""
        return self.folded or 1

    def moves(self, ref, tile, rows, step):
        """(source, target) of each copy: ``rows`` are a start and a count."""
        start, count = rows
        first = step * self.columns
        if self.folded is None:
            yield ref.at[pl.ds(start, count), pl.ds(first, self.columns)], tile
            return
        width = self.array.shape[1] // self.folded
        here = pl.ds(lax.div(start, self.folded), count // self.folded)
        for i in range(self.folded):
            columns = pl.ds(i * width + first, self.columns)
            yield ref.at[here, columns], tile.at[i]


def tuned(op: str, shape: tuple[int, ...], usual: bool, default: Callable) -> Tuning:
    """This device's table for ``op``, where it is ``usual``; else ``default()``."""
    found = tables.look_up(op, shape) if usual else None
    return Tuning(**found) if found else default()


def filled(
    tile: int, steps: Sequence[int], shape, size: float, *, wide: bool, sums=True
) -> Tuning:
    """Tiles for x of 8 bits that fill the chip and the memory of its processors.

    ``shape`` is (rows, inputs, outputs) and ``size`` the bytes of a weight; the step is
    the first of ``steps`` whose splits suffice, else the last. A ``wide`` result is
    float32; a bfloat16 one leaves more room. Rows of a tile are ``tile``, or fewer
    where copies would not run ahead of the products.
    """
    rows, inputs, outputs = shape
    for step in steps:
        warpgroups, splits = hopper.spread(rows, tile, outputs, inputs // step)
        lanes = LANES * warpgroups
        if -(-rows // tile) * (outputs // lanes) * splits >= hopper.PROCESSORS:
            break
    # ``hopper.depth`` counts four bytes for each element of the result.
    height = tile if wide or splits > 1 else tile // 2
    stage, count = int((lanes * size + tile) * step), inputs // step // splits
    stages = hopper.depth(stage, lanes, height, count)
    if stages == 1 < count and tile > LANES:
        return filled(tile // 2, steps, shape, size, wide=wide, sums=sums)
    return Tuning(tile, step, stages, splits, warpgroups, sums)
