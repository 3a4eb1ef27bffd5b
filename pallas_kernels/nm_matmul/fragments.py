"""Kept values and their mask in registers -> dense operands of Hopper's wgmma.

A thread holds 16 neighbouring inputs of a row: 16 bits of the mask and the 8 values
that they keep, two to a word. Four inputs of these are its part of one of wgmma's
tiles of 16 columns (``permute`` with four tiles gives x that order). A byte permutation
puts the values at their places; the bytes that select them come from tables, looked up
for four tiles at once by the bits of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.fragments import (
    HALVES,
    OUT,
    ROW,
    ROW_AXIS,
    WORDS,
    by_row,
    each_register,
    look_up,
    neighbours,
    permute,
    words_of,
)

TILES = 4  # of wgmma that a thread's inputs belong to
PATTERNS = ((2, 4), (4, 8))
ABSENT = 0x44  # selects a byte of a second word, which is zero
MAGIC = 128  # bfloat16 0x4300 | n is 128 + n


def value_layout(itemsize: int):
    """Eight kept values of a thread, in registers of 16 bytes."""
    return neighbours(8, 16 // itemsize)


def from_floats(values, layout, flags, m: int, *, interpret: bool):
    """The dense tile [64, inputs] in bfloat16 of kept values [64, inputs / 2].

    ``layout`` is how values were loaded: ``value_layout`` of what they were stored as.
    ``flags`` [64, inputs / 8] uint8 have m / 2 bits set in each group of m.
    """
    if interpret:
        return _plain(values, flags, m)
    shape = (values.shape[0], 2 * values.shape[1])
    kind = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=OUT)

    @plgpu.inline_mgpu(arg_types=(layout, HALVES), return_type=kind)
    def expand(_, values, flags):
        def found(word, index):
            # One register of eight bfloat16, or two of four that were float32.
            registers = values.registers[index[:-1]].reshape(-1)
            words = [word for each in registers for word in words_of(each)]
            return [placed(words, word, m)]

        (out,) = each_register(flags, found)
        return out

    return expand(values, flags)


def from_codes(codes, shifts: Sequence, flags, m: int, *, interpret: bool):
    """The same of codes of four bits [64, inputs / 4], 128 + code less all ``shifts``.

    A shift is a number, or a column [64] of a bfloat16 twice in a uint32.
    """
    if interpret:
        return _plain(_plain_codes(codes, shifts), flags, m)
    shape = (codes.shape[0], 4 * codes.shape[1])
    kind = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=OUT)
    columns = [shift for shift in shifts if not isinstance(shift, float)]
    layouts = (WORDS, HALVES) + (ROW,) * len(columns)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=kind)
    def expand(_, codes, flags, *columns):
        def found(word, index):
            own = iter(columns)
            row = index[ROW_AXIS]
            less = [
                word.constant(doubled(shift))
                if isinstance(shift, float)
                else by_row(next(own), row)
                for shift in shifts
            ]
            words = code_pairs(words_of(codes.registers[index])[0], less)
            return [placed(words, word, m)]

        (out,) = each_register(flags, found)
        return out

    return expand(codes, flags, *columns)


def twice(column):
    """A float32 column, rounded to bfloat16, twice in a uint32."""
    rounded = column.astype(jnp.bfloat16).astype(jnp.float32)
    bits = lax.bitcast_convert_type(rounded, jnp.uint32)
    return bits | lax.shift_right_logical(bits, jnp.full_like(bits, 16))


def doubled(value: float) -> int:
    """A number as two bfloat16 in a word."""
    return int(np.asarray(value, jnp.bfloat16).view(np.uint16)) * 0x00010001


def code_pairs(word, less: list) -> list:
    """Four bytes -> four pairs of 128 + nibble, the low one first, less ``less``."""
    low, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
    found = []
    for byte in range(4):
        pair = low.permuted(high, 0x4400 + 0x1111 * byte)
        pair = (pair & 0x00FF00FF) | 0x43004300
        for one in less:
            pair = pair.minus(one)
        found.append(pair)
    return found


def placed(words: list, flags, m: int) -> list:
    """Eight kept values in four words -> 16 inputs in eight, zero where no flag is."""
    if m == 4:
        return _placed_of_4(words, flags)
    return _placed_of_8(words, flags)


def _placed_of_4(words: list, flags):
    """Each word has two values of a group; its first three flags imply the fourth."""
    index, nothing = flags & 0x7777, flags.constant(0)
    selects = [look_up(index, index, _quads(flags, table)) for table in _two_of_four()]
    return [
        word.permuted(nothing, _pair(selects, tile, half))
        for tile, word in enumerate(words)
        for half in range(2)
    ]


def _placed_of_8(words: list, flags):
    """A group's first four inputs count values from the first, others from the last."""
    blend, index = ((flags & 0x8888) >> 1) | 0x3210, flags & 0x7777
    found = []
    for tile in range(TILES):
        tables = _four_of_eight(last=bool(tile % 2))
        selects = [look_up(index, blend, _quads(flags, table)) for table in tables]
        first, second = words[tile // 2 * 2 : tile // 2 * 2 + 2]
        for half in range(2):
            pair = first.permuted(second, _pair(selects, tile, half))
            bits = flags >> 4 * tile + 2 * half
            found.append(pair & (((bits & 1) | ((bits & 2) << 15)) * 0xFFFF))
    return found


def _pair(selects: list, tile: int, half: int):
    """The selection of two inputs of a tile, from the bytes of each of its inputs."""
    first, second = selects[2 * half : 2 * half + 2]
    return first.permuted(second, tile | (4 + tile) << 4)


def _quads(word, table: list[int]) -> list:
    quads = np.asarray(table, np.uint8).view("<u4")
    return [word.constant(int(quad)) for quad in quads]


def _before(flags: int, i: int) -> int:
    return (flags & (1 << i) - 1).bit_count()


def _byte(rank: int) -> int:
    """Selects the two bytes of a value, the lower one first."""
    return 0x10 + 0x22 * rank


def _two_of_four() -> list[list[int]]:
    """For each input of a group, what selects its value, by the first three flags."""
    groups = [b if b.bit_count() == 2 else b | 8 for b in range(7)] + [3]  # 7: none
    return [
        [
            _byte((g & (1 << i) - 1).bit_count()) if g >> i & 1 else ABSENT
            for g in groups
        ]
        for i in range(4)
    ]


def _four_of_eight(last: bool) -> list[list[int]]:
    """The same by all four flags, of the first or the ``last`` half of a group."""
    rank = (lambda g, i: 4 - (g >> i).bit_count()) if last else _before
    return [
        [_byte(rank(g, i)) if g >> i & 1 else 0 for g in range(16)] for i in range(4)
    ]


def _plain_codes(codes, shifts):
    """[64, inputs / 2] of codes in their order."""
    wide = codes.astype(jnp.int32)
    pairs = jnp.stack((wide & 15, wide >> 4), -1).reshape(len(wide), -1)
    values = (pairs + MAGIC).astype(jnp.bfloat16)
    for shift in shifts:
        if not isinstance(shift, float):
            high = shift & jnp.uint32(0xFFFF0000)
            shift = lax.bitcast_convert_type(high, jnp.float32)[:, None]
        values = (values - shift).astype(jnp.bfloat16)
    return values


def _plain(values, flags, m: int):
    wide = flags.astype(jnp.int32)[..., None]
    bits = (wide >> jnp.arange(8) & 1).reshape(len(flags), -1)
    place = jnp.cumsum(bits, 1) - bits
    dense = jnp.take_along_axis(values, place, 1, mode="clip")
    return permute(jnp.where(bits == 1, dense, 0).astype(jnp.bfloat16), TILES)
