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
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import compat
from pallas_kernels.hopper import TILE

ROW_AXIS = 4  # of a tile's registers: 0 for a thread's upper row, 1 for its lower
OUT = plgpu.Layout.WGMMA
WORDS = plgpu.Layout.WGMMA_UPCAST_2X
ROW = plgpu.Layout.WGMMA.reduce(1)


def neighbours(count: int, vector: int):
    """WORDS, but a thread has ``count`` neighbours where it has four there.

    They come in registers of ``vector`` elements.
    """
    wide, last = 4 * count, ((vector,),) if vector < count else ()
    tiles = ((64, wide), (16, wide), (8, wide), (2 * count,), (count,), *last)
    lanes = (-4, -2, -3) if vector == count else (-5, -3, -4)
    return plgpu.Layout.TILED(
        Tiling(tiles), warp_dims=(lanes[0] - 4,), lane_dims=lanes, vector_dim=-1
    )


HALVES = neighbours(2, 2)


def permute(a, tiles: int = 1):
    """The minor axis in wgmma's order, where threads hold neighbours in ``tiles``.

    16 columns of each tile are (block, half, pair, element), the first two exchanged.
    """
    lead, columns = a.shape[:-1], a.shape[-1]
    # .., block, half, tile, pair, element
    a = a.reshape(*lead, columns // (TILE * tiles), 2, 2, tiles, 2, 2)
    k = len(lead) + 1
    order = (*range(k), k + 2, k + 3, k + 1, k, k + 4)
    return a.transpose(order).reshape(*lead, columns)


def in_order(x, size: int, places: int):
    """x [M, K], steps of ``size`` bytes by their place in the byte, permuted."""
    x = x.reshape(len(x), -1, size, places).swapaxes(2, 3)
    return permute(x).reshape(len(x), -1)


def digits(words, part: int, place: int, *, interpret: bool):
    """128 + the digit of ``part`` bits at ``place`` of each byte (8 bits: byte - 128).

    ``words`` [64, bytes] uint8; returns bfloat16 in wgmma's layout and order.
    """
    if interpret:
        return _plain_digits(words, part, place)
    kind = plgpu.ShapeDtypeStruct(words.shape, jnp.bfloat16, layout=OUT)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=kind)
    def peel(_, array):
        (out,) = each_register(array, lambda r, _: [digit_pairs(r, part, place)])
        return out

    return peel(words)


def lookup(words, levels: tuple[float, ...], part: int = 4, *, interpret: bool):
    """For each place in a byte, the level of its code of ``part`` bits."""
    table = np.zeros(max(4, 2**part), jnp.bfloat16)
    table[: len(levels)] = levels
    if interpret:
        return _plain_lookup(words, table, part)
    kind = plgpu.ShapeDtypeStruct(words.shape, jnp.bfloat16, layout=OUT)
    bits = table.view(np.uint16)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=(kind,) * (8 // part))
    def look(_, array):
        return tuple(each_register(array, lambda r, _: level_pairs(r, bits, part)))

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
    kind = plgpu.ShapeDtypeStruct(words.shape, jnp.bfloat16, layout=OUT)
    planes = [words] if below is None else [words, below]
    layouts = (WORDS, HALVES)[: len(planes)] + (ROW,) * len(table)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=(kind,) * (8 // part))
    def look(_, *arrays):
        array, *lower = arrays[: len(planes)]
        stored = arrays[len(planes) :]
        tables = [bytes_of([by_row(c, row) for c in stored]) for row in range(2)]

        def found(word, index):
            low = words_of(lower[0].registers[index])[0] if lower else None
            return entry_pairs(word, low, *tables[index[ROW_AXIS]], part)

        return tuple(each_register(array, found))

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


def _plain_lookup(words, table, part: int):
    words = permute(words.astype(jnp.int32))
    out = []
    for place in range(8 // part):
        code = lax.shift_right_logical(words, part * place) & (2**part - 1)
        value = jnp.zeros(words.shape, jnp.bfloat16)
        for i, level in enumerate(table):
            value = jnp.where(code == i, level, value)
        out.append(value)
    return tuple(out)


def each_register(array, function):
    """Arrays in wgmma's layout from the pairs that the bytes of a register become.

    ``function(word, index)`` returns a list of pairs for each array.
    """
    made = {
        index: function(words_of(register)[0], index)
        for index, register in np.ndenumerate(array.registers)
    }
    layout, (first, *_) = OUT.to_mgpu(), made.values()
    count = len(first[0])  # pairs of a register, each of eight columns
    shape = layout.registers_shape(
        (array.shape[0], 8 * count * array.registers.shape[1])
    )
    outs = [np.empty(shape, object) for _ in first]
    for index, lists in made.items():
        for out, pairs in zip(outs, lists, strict=True):
            for i, pair in enumerate(pairs):
                out[(index[0], count * index[1] + i, *index[2 : out.ndim])] = (
                    pair.floats()
                )
    return [compat.in_registers(out, layout) for out in outs]


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


def level_pairs(word, bits: np.ndarray, part: int = 4) -> list[list]:
    """``entry_pairs`` of levels known while tracing, 4 or more as uint16."""
    quads = [((bits >> shift) & 0xFF).astype(np.uint8).view("<u4") for shift in (0, 8)]
    tables = [[word.constant(int(quad)) for quad in one] for one in quads]
    return entry_pairs(word, None, *tables, part)


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
        by_byte = [look_up(index, blend, quads) for quads in (low, high)]
        first.append(by_byte[0].permuted(by_byte[1], 0x6240))
        second.append(by_byte[0].permuted(by_byte[1], 0x7351))
    return first, second


def look_up(index, blend, quads: list):
    """Four entries of a table of 4, 8 or 16 bytes."""
    if len(quads) < 4:
        return quads[0].permuted(quads[-1], index)
    a, b, c, d = quads
    return a.permuted(b, index).permuted(c.permuted(d, index), blend)


def by_row(column, row: int) -> Word:
    """A thread's value of a column of 32 bits for its upper or its lower row."""
    return words_of(column.registers[0, 0, row, 0, 0])[0]


def words_of(register) -> list[Word]:
    """The words of a register; two bytes are the low half of one."""
    kind = ir.VectorType(register.type)
    size = kind.shape[0] * kind.element_type.width
    if size >= 32:
        words = vector.bitcast(ir.VectorType.get((size // 32,), _i32()), register)
        at = range(size // 32)
        return [Word(llvm.extractelement(words, Word.constant(i).value)) for i in at]
    half = ir.VectorType.get((1,), ir.IntegerType.get_signless(size))
    value = llvm.extractelement(vector.bitcast(half, register), Word.constant(0).value)
    return [Word(arith.extui(_i32(), value))]


class Word:
    """A 32-bit register while the kernel is built; tests put integers in its place."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def constant(cls, value: int) -> Word:
        signed = value - 2**32 if value >= 2**31 else value
        return cls(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed)))

    def __and__(self, other: int | Word) -> Word:
        other = self.constant(other) if isinstance(other, int) else other
        return Word(arith.andi(self.value, other.value))

    def __mul__(self, factor: int) -> Word:
        return Word(arith.muli(self.value, self.constant(factor).value))

    def __or__(self, other: int | Word) -> Word:
        other = self.constant(other) if isinstance(other, int) else other
        return Word(arith.ori(self.value, other.value))

    def __xor__(self, mask: int) -> Word:
        return Word(arith.xori(self.value, self.constant(mask).value))

    def __lshift__(self, count: int) -> Word:
        return Word(arith.shli(self.value, self.constant(count).value))

    def __rshift__(self, count: int) -> Word:
        return Word(arith.shrui(self.value, self.constant(count).value))

    def permuted(self, other: Word, select) -> Word:
        """PTX prmt: result byte i is byte (nibble i of ``select``) of the two words."""
        select = self.constant(select) if isinstance(select, int) else select
        words = [self.value, other.value, select.value]
        text = "prmt.b32 $0, $1, $2, $3;"
        return Word(llvm.inline_asm(_i32(), words, text, "=r,r,r,r"))

    def minus(self, other: Word) -> Word:
        """Two bfloat16 differences."""
        words, text = [self.value, other.value], "sub.bf16x2 $0, $1, $2;"
        return Word(llvm.inline_asm(_i32(), words, text, "=r,r,r"))

    def floats(self):
        """The register as two bfloat16."""
        one = vector.broadcast(ir.VectorType.get((1,), _i32()), self.value)
        return vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), one)


def _i32():
    return ir.IntegerType.get_signless(32)
