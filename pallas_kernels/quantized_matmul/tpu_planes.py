"""How the bytes of a plane are read on a TPU, and how tiles divide them.

A plane holds codes of 1, 2, 4 or 8 bits, [out, in] with ``in`` packed in the minor
axis, exactly as stored. A byte holds neighbouring inputs, so codes peeled from a row
of bytes with one shift belong to every second (4 bits), fourth ... input: ``x`` is put
in that order instead of the weights, 128 bytes ("a piece") at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import unit_width

LANES = 128
FEW = 64  # rows of a decoding step


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the codes of a plane of ``part`` bits become small integers.

    Codes stand in the high bits of an int8 (``signed``: the value is the integer over
    2^(8 - part), after ``flip``) or in its low bits. ``flip`` is xored in: 0x80 centres
    an offset code, 0 leaves two's complement. ``fill`` is set below the code: half a
    step, which makes one bit -1/2 or +1/2. ``levels`` are looked up by the low bits.
    ``factor`` multiplies the result.
    """

    part: int
    signed: bool = True
    flip: int = 0x80
    fill: int = 0
    levels: tuple[float, ...] | None = None
    factor: float = 1.0

    @property
    def phases(self) -> int:
        return 8 // self.part

    @property
    def multiplier(self) -> float:
        """What the scale is multiplied by, since ``read`` leaves codes shifted."""
        return self.factor * (2.0 ** (self.part - 8) if self.signed else 1.0)

    def read(self, words, phase: int):
        """int8 (or the level) of the codes of one phase, from int32 words of bytes."""
        low = phase * self.part
        if self.signed:
            up = 8 - self.part - low
            mask = _bytes(0xFF & (0xFF << (8 - self.part)))
            high = lax.shift_left(words, jnp.int32(up)) if up else words
            value = high & mask if self.part < 8 else high
            value = value ^ _bytes(self.flip) if self.flip else value
            value = value | _bytes(self.fill) if self.fill else value
        else:
            down = lax.shift_right_logical(words, jnp.int32(low)) if low else words
            value = down & _bytes(2**self.part - 1)
        codes = pltpu.bitcast(value, jnp.int8)
        return codes if self.levels is None else _look_up(self.levels, codes)


def _bytes(value: int) -> Array:
    """A byte repeated through an int32 word."""
    word = int.from_bytes(bytes([value]) * 4, "little", signed=True)
    return jnp.int32(word)


def _look_up(levels: tuple[float, ...], codes):
    """levels[codes] by a gather within the lanes of a table."""
    index = codes.astype(jnp.int32)
    lane = lax.broadcasted_iota(jnp.int32, index.shape, 1)
    table = functools.reduce(
        lambda rest, level: jnp.where(lane == level[0], level[1], rest),
        enumerate(levels),
        jnp.zeros(index.shape, jnp.float32),
    )
    return jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes: ``rows`` of x, ``columns`` of y, ``inputs`` a step.

    ``split`` keeps blocks apart in the product (few rows) instead of folding the scale
    into the weight. ``chunk`` rows are multiplied between two turns of a loop.
    """

    rows: int
    columns: int
    inputs: int
    split: bool
    chunk: int = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """How bytes, blocks of scale and lanes divide each other."""

    inputs: int
    block: int  # inputs that share a scale
    readings: tuple[Reading, ...]

    def __post_init__(self):
        for reading in self.readings:
            if self.inputs % reading.phases or self.row(reading) % self.lanes(reading):
                raise NotImplementedError(
                    f"{self.inputs} inputs of {reading.part} bits are no whole number "
                    f"of {LANES}-byte pieces"
                )
            slot, span = self.slot(reading), self.span(reading)
            if self.blocks > 1 and (
                self.inputs % self.block
                or self.block % reading.phases
                or self.lanes(reading) % slot
                or span % slot
            ):
                raise NotImplementedError(
                    f"blocks of {self.block} among {self.inputs} inputs do not divide "
                    f"the {LANES} lanes at {reading.part} bits"
                )

    @property
    def blocks(self) -> int:
        return -(-self.inputs // self.block)

    @property
    def parts(self) -> list[int]:
        """The widths of plane, each once."""
        return list(dict.fromkeys(r.part for r in self.readings))

    def row(self, reading: Reading) -> int:
        """Bytes of one output."""
        return self.inputs // reading.phases

    def lanes(self, reading: Reading) -> int:
        """Bytes of one piece: 128, or the whole of a short row."""
        return min(LANES, self.row(reading))

    def span(self, reading: Reading) -> int:
        """Bytes of one block."""
        return self.block // reading.phases

    def slot(self, reading: Reading) -> int:
        """Bytes of one piece that share a scale."""
        return max(1, min(self.span(reading), self.lanes(reading)))

    def slots(self, reading: Reading) -> int:
        return self.lanes(reading) // self.slot(reading)

    def tile(self, wanted: int) -> int:
        """The largest dividing number of inputs up to ``wanted``, in whole pieces."""
        unit = max(self.lanes(r) * r.phases for r in self.readings)
        pieces = self.inputs // unit
        fits = [n for n in range(1, pieces + 1) if pieces % n == 0]
        return unit * max(n for n in fits if n == 1 or n * unit <= wanted)

    def tuning(self, rows: int, outputs: int, itemsize: int) -> Tuning:
        """Tiles for these shapes: long and thin for few rows, square for many.

        Many rows of x, of elements of ``itemsize`` bytes, share a tile of the weight.
        """
        if rows <= 512:
            split = rows * max(map(self.slots, self.readings)) <= 64
            inputs = self.tile(4096 if rows <= FEW else 1024)
            return Tuning(rows, min(outputs, 512), inputs, split)
        # A turn of some 4,000 cycles hides its start and end, and compiles in seconds.
        # Of the columns, those are best that least stand beyond the outputs.
        wide = unit_width() > 128
        depth, work = (2048, 2**30) if wide else (1024, 2**28)
        inputs = self.tile(depth // len(self.parts))
        choice = (1024, 768, 512) if wide else (512,)
        columns = min(choice, key=lambda n: -(-outputs // n) * n)
        return Tuning(
            rows=min(rows, 4096 // itemsize),
            columns=min(outputs, columns),
            inputs=inputs,
            split=False,
            chunk=max(512, work // (columns * inputs) // 256 * 256),
        )


@dataclasses.dataclass(frozen=True)
class Groups:
    """The split body's rows: ``pieces[i]`` pieces of plane i share eight sublanes."""

    rows: int
    pieces: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, rows: int, inputs: int) -> Groups:
        """As many pieces together as fill eight rows; rows padded where none do."""
        rows = rows if rows < 8 else -(-rows // 8) * 8
        while True:
            pieces = tuple(
                math.gcd(
                    max(1, 8 // (plan.slots(r) * rows))
                    if plan.span(r) <= plan.lanes(r)
                    else 1,
                    inputs // (plan.lanes(r) * r.phases),
                )
                for r in plan.readings
            )
            heights = (
                n * plan.slots(r) * rows
                for n, r in zip(pieces, plan.readings, strict=True)
            )
            if all(height % 8 == 0 for height in heights):
                return cls(rows, pieces)
            rows += 1
