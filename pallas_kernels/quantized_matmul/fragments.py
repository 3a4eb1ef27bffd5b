"""Packed bytes of W in registers -> bfloat16 operands of Hopper's wgmma.

A thread loads four neighbouring bytes of a row at a time (layout UPCAST_2X). wgmma
wants each thread to hold columns 2q, 2q+1, 2q+8, 2q+9 of 16; instead of exchanging
registers between threads, the four bytes are declared to be those columns, and
``permute`` gives x the same order. Digits become floats without a conversion:
0x4300 | n is bfloat16 128 + n for n < 128, so that one byte permutation builds two.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

TILE = 16  # columns that wgmma multiplies at a time
_OUT = plgpu.Layout.WGMMA
_IN = plgpu.Layout.WGMMA_UPCAST_2X


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

    @plgpu.inline_mgpu(arg_types=(_IN,), return_type=kind)
    def peel(_, array):
        (out,) = _each_register(array, lambda r: [digit_pairs(r, part, place)])
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

    @plgpu.inline_mgpu(arg_types=(_IN,), return_type=(kind, kind))
    def look(_, array):
        return tuple(_each_register(array, lambda r: level_pairs(r, bits)))

    return look(words)


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
        made = function(_Word(llvm.extractelement(word, _Word.constant(0).value)))
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

    ``bits`` are the 16 levels as uint16. A byte permutation looks up four 3-bit
    indices in eight bytes at once; a third one takes the fourth bit into account.
    """
    index = word & 0x77777777
    blend = ((word & 0x88888888) >> 1) | 0x32103210
    low, high = [], []
    for half in range(2):
        if half:
            index, blend = index >> 16, blend >> 16
        by_byte = [_look(index, blend, (bits >> shift) & 0xFF) for shift in (0, 8)]
        low.append(by_byte[0].permuted(by_byte[1], 0x6240))
        high.append(by_byte[0].permuted(by_byte[1], 0x7351))
    return low, high


def _look(index, blend, table):
    """Four entries of a table of 16 bytes."""
    quads = table.astype(np.uint8).view("<u4")
    a, b, c, d = (index.constant(int(quad)) for quad in quads)
    return a.permuted(b, index).permuted(c.permuted(d, index), blend)


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

    def __or__(self, mask: int) -> _Word:
        return _Word(arith.ori(self.value, self.constant(mask).value))

    def __xor__(self, mask: int) -> _Word:
        return _Word(arith.xori(self.value, self.constant(mask).value))

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
