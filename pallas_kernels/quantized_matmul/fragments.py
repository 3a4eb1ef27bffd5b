"""Packed bytes of W in registers -> bfloat16 operands of Hopper's wgmma.

A thread loads four neighbouring bytes of a row at a time (layout UPCAST_2X). wgmma
wants each thread to hold columns 2q, 2q+1, 2q+8, 2q+9 of 16; instead of exchanging
registers between threads, the four bytes are declared to be those columns, and
``permute`` gives x the same order. Digits become floats without a conversion:
0x4300 | n is bfloat16 128 + n for n < 128, so that one byte permutation builds two.
Tables are looked up by byte permutations too, in constants or in a row's registers.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import compat

TILE = 16  # columns that wgmma multiplies at a time
_ROW_AXIS = 4  # of a tile's registers: 0 for a thread's upper row, 1 for its lower
_OUT = plgpu.Layout.WGMMA
WORDS = plgpu.Layout.WGMMA_UPCAST_2X
_ROW = plgpu.Layout.WGMMA.reduce(1)
# WORDS with two bytes where that has four.
HALVES = plgpu.Layout.TILED(
    Tiling(((64, 8), (16, 8), (8, 8), (4,), (2,))),
    warp_dims=(-8,),
    lane_dims=(-4, -2, -3),
    vector_dim=-1,
)


def permute(a):
    """The minor axis in wgmma's order: 16 columns as (block, half, pair, element)."""
    lead, columns = a.shape[:-1], a.shape[-1]
    a = a.reshape(*lead, columns // TILE, 2, 2, 2, 2)  # .., block, half, pair, element
    k = len(lead) + 1
    order = (*range(k), k + 2, k + 1, k, k + 3)  # .., pair, half, block, element
    return a.transpose(order).reshape(*lead, columns)


def digits(words, part: int, place: int, *, interpret: bool):
    """128 + the digit of ``part`` bits at ``place`` of each byte (8 bits: byte - 128).

    ``words`` [64, bytes] uint8; returns bfloat16 in wgmma's layout and order.
    """
    if interpret:
        return _plain_digits(words, part, place)
    kind = plgpu.ShapeDtypeStruct(words.shape, jnp.bfloat16, layout=_OUT)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=kind)
    def peel(_, array):
        (out,) = _each_register(array, lambda r, _: [digit_pairs(r, part, place)])
        return out

    return peel(words)


def lookup(words, levels: tuple[float, ...], *, interpret: bool):
    """(low, high): the level of the low and of the high nibble of each byte."""
    table = np.asarray(levels, jnp.bfloat16)
    table = np.concatenate([table, np.zeros(16 - len(table), table.dtype)])
    if interpret:
        return _plain_lookup(words, table)
    kind = plgpu.ShapeDtypeStruct(words.shape, jnp.bfloat16, layout=_OUT)
    bits = table.view(np.uint16)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=(kind, kind))
    def look(_, array):
        return tuple(_each_register(array, lambda r, _: level_pairs(r, bits)))

    return look(words)


def load(plane, part: int, widest: int):
    """Bytes of a plane [64, bytes], as ``entries`` takes them.

    Threads hold the same inputs of a plane of ``part`` bits as of the ``widest`` one.
    """
    return compat.load(plane, WORDS if part == widest else HALVES)


def entries(words, below, table, part: int, *, interpret: bool):
    """For each place in a byte, the entries of each row's own table.

    ``words`` [64, bytes] uint8 hold codes of ``part`` bits, or of codes of three their
    upper two, and ``below`` [64, bytes / 2] the lowest. ``table`` lists its entries by
    two: columns [64] of two bfloat16 as uint32.
    """
    if interpret:
        return _plain_entries(words, below, table, part)
    kind = plgpu.ShapeDtypeStruct(words.shape, jnp.bfloat16, layout=_OUT)
    planes = [words] if below is None else [words, below]
    layouts = (WORDS, HALVES)[: len(planes)] + (_ROW,) * len(table)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=(kind,) * (8 // part))
    def look(_, *arrays):
        array, *lower = arrays[: len(planes)]
        stored = arrays[len(planes) :]
        tables = [
            bytes_of([_scalar(c.registers[0, 0, row, 0, 0]) for c in stored])
            for row in range(2)
        ]

        def found(word, index):
            low = _low_word(lower[0].registers[index]) if lower else None
            return entry_pairs(word, low, *tables[index[_ROW_AXIS]], part)

        return tuple(_each_register(array, found))

    return look(*planes, *table)


def _plain_entries(words, below, table, part: int):
    codes, ones = words.astype(jnp.int32), 2**part - 1
    places = [(codes >> part * j) & ones for j in range(8 // part)]
    if below is not None:
        bits = jnp.repeat(below.astype(jnp.int32), 2, 1)
        bits = bits >> 4 * (jnp.arange(bits.shape[1]) % 2)
        places = [2 * code | (bits >> j & 1) for j, code in enumerate(places)]
    half = lambda pair, i: (pair >> 16 * i).astype(jnp.uint16)  # noqa: E731
    stored = [half(pair, i) for pair in table for i in range(2)]
    values = jnp.stack([lax.bitcast_convert_type(e, jnp.bfloat16) for e in stored], 1)
    return tuple(jnp.take_along_axis(values, permute(code), 1) for code in places)


def _plain_digits(words, part: int, place: int):
    words = permute(words.astype(jnp.int32))
    if part == 8:
        return (words - 128).astype(jnp.bfloat16)
    digit = lax.shift_right_logical(words, part * place) & (2**part - 1)
    return (digit + 128).astype(jnp.bfloat16)


def _plain_lookup(words, table):
    words = permute(words.astype(jnp.int32))
    out = []
    for code in (words & 15, lax.shift_right_logical(words, 4)):
        value = jnp.zeros(words.shape, jnp.bfloat16)
        for i, level in enumerate(table):
            value = jnp.where(code == i, level, value)
        out.append(value)
    return tuple(out)


def _each_register(array, function):
    """Arrays in wgmma's layout from the pairs that four bytes become."""
    layout = _OUT.to_mgpu()
    outs = None
    for index, register in np.ndenumerate(array.registers):
        word = vector.bitcast(ir.VectorType.get((1,), _i32()), register)
        made = function(_scalar(word), index)
        if outs is None:
            shape = layout.registers_shape(array.shape)
            outs = [np.empty(shape, object) for _ in made]
        for out, pairs in zip(outs, made, strict=True):
            for i, pair in enumerate(pairs):
                out[(index[0], 2 * index[1] + i, *index[2:-1])] = pair.floats()
    return [
        mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)
        for out in outs
    ]


def digit_pairs(word, part: int, place: int) -> list:
    """Four bytes -> two words of two bfloat16, in the order of the bytes."""
    if part == 8:
        return [_signed_pair(word, select) for select in (0x4140, 0x4342)]
    if place:
        word = word >> part * place
    word = word & (2**part - 1) * 0x01010101
    magic = word.constant(0x43)
    return [word.permuted(magic, select) for select in (0x4140, 0x4342)]


def _signed_pair(word, select: int):
    """Bytes b -> b - 128: 128 + the low seven bits, less 256 or 128 by the top bit."""
    pair = word.permuted(word.constant(0x43), select)
    return (pair & 0xFF7FFF7F).minus((pair ^ 0x00800080) & 0xFF80FF80)


def level_pairs(word, bits: np.ndarray) -> tuple[list, list]:
    """Eight nibbles -> (pairs of the low nibbles, pairs of the high ones).

    ``bits`` are the 16 levels as uint16.
    """
    quads = [((bits >> shift) & 0xFF).astype(np.uint8).view("<u4") for shift in (0, 8)]
    tables = [[word.constant(int(quad)) for quad in one] for one in quads]
    low, high = entry_pairs(word, None, *tables, 4)
    return low, high


def bytes_of(words: list) -> tuple[list, list]:
    """The low and the high bytes, four to a word, of entries that lie two to a word."""
    pairs = list(zip(words[::2], words[1::2] or words, strict=True))
    selects = (0x6420, 0x7531)
    low, high = ([a.permuted(b, select) for a, b in pairs] for select in selects)
    return low, high


def entry_pairs(word, below, low: list, high: list, part: int) -> list[list]:
    """The codes at each place of four bytes -> two words of two entries.

    ``low`` and ``high`` are the bytes of up to 16 entries, four to a word; ``below``
    16 bits that go below the 16 codes of two bits.
    """
    reach = 4 // part  # places of one nibble
    found = [[] for _ in range(2 * reach)]
    for place in range(reach):
        index = (word >> part * place) & (2**part - 1) * 0x11111111
        if below is not None:
            index = (index << 1) | _every_fourth(below >> place)
        found[place], found[place + reach] = _nibble_pairs(index, low, high)
    return found


def _every_fourth(word):
    """The even ones of 16 bits, moved to the lowest bits of eight nibbles."""
    word = word & 0x5555
    word = (word | (word << 8)) & 0x00550055
    word = (word | (word << 4)) & 0x05050505
    return (word | (word << 2)) & 0x11111111


def _nibble_pairs(index, low: list, high: list) -> tuple[list, list]:
    """Entries of eight nibbles: (pairs of the low nibbles, pairs of the high ones).

    A byte permutation looks up four 3-bit indices in eight bytes at once; of 16
    entries, a third one takes the fourth bit into account.
    """
    blend = index
    if len(low) > 2:
        blend = ((index & 0x88888888) >> 1) | 0x32103210
        index = index & 0x77777777
    first, second = [], []
    for half in range(2):
        if half:
            index, blend = index >> 16, blend >> 16
        by_byte = [_look(index, blend, quads) for quads in (low, high)]
        first.append(by_byte[0].permuted(by_byte[1], 0x6240))
        second.append(by_byte[0].permuted(by_byte[1], 0x7351))
    return first, second


def _look(index, blend, quads: list):
    """Four entries of a table of 4, 8 or 16 bytes."""
    if len(quads) < 4:
        return quads[0].permuted(quads[-1], index)
    a, b, c, d = quads
    return a.permuted(b, index).permuted(c.permuted(d, index), blend)


def _scalar(register) -> _Word:
    """A register of 32 bits, held as a vector of one."""
    return _Word(llvm.extractelement(register, _Word.constant(0).value))


def _low_word(register) -> _Word:
    """Two bytes as the low half of a word."""
    half = ir.IntegerType.get_signless(16)
    pair = vector.bitcast(ir.VectorType.get((1,), half), register)
    value = llvm.extractelement(pair, _Word.constant(0).value)
    return _Word(arith.extui(_i32(), value))


class _Word:
    """A 32-bit register while the kernel is built; tests put integers in its place."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def constant(cls, value: int) -> _Word:
        signed = value - 2**32 if value >= 2**31 else value
        return cls(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed)))

    def __and__(self, mask: int) -> _Word:
        return _Word(arith.andi(self.value, self.constant(mask).value))

    def __or__(self, other: int | _Word) -> _Word:
        other = self.constant(other) if isinstance(other, int) else other
        return _Word(arith.ori(self.value, other.value))

    def __xor__(self, mask: int) -> _Word:
        return _Word(arith.xori(self.value, self.constant(mask).value))

    def __lshift__(self, count: int) -> _Word:
        return _Word(arith.shli(self.value, self.constant(count).value))

    def __rshift__(self, count: int) -> _Word:
        return _Word(arith.shrui(self.value, self.constant(count).value))

    def permuted(self, other: _Word, select) -> _Word:
        """PTX prmt: result byte i is byte (nibble i of ``select``) of the two words."""
        select = self.constant(select) if isinstance(select, int) else select
        words = [self.value, other.value, select.value]
        text = "prmt.b32 $0, $1, $2, $3;"
        return _Word(llvm.inline_asm(_i32(), words, text, "=r,r,r,r"))

    def minus(self, other: _Word) -> _Word:
        """Two bfloat16 differences."""
        words, text = [self.value, other.value], "sub.bf16x2 $0, $1, $2;"
        return _Word(llvm.inline_asm(_i32(), words, text, "=r,r,r"))

    def floats(self):
        """The register as two bfloat16."""
        one = vector.broadcast(ir.VectorType.get((1,), _i32()), self.value)
        return vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), one)


def _i32():
    return ir.IntegerType.get_signless(32)
