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
        (out,) = _each_register(array, lambda r: [_digit_pairs(r, part, place)])
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
        return tuple(_each_register(array, lambda r: _level_pairs(r, bits)))

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
        word = llvm.extractelement(word, _constant(0))
        made = function(word)
        if outs is None:
            shape = layout.registers_shape(array.shape)
            outs = [np.empty(shape, object) for _ in made]
        for out, pairs in zip(outs, made, strict=True):
            for i, pair in enumerate(pairs):
                out[(index[0], 2 * index[1] + i, *index[2:-1])] = _as_pair(pair)
    return [
        mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)
        for out in outs
    ]


def _digit_pairs(word, part: int, place: int):
    """Four bytes -> two registers of two bfloat16."""
    if part == 8:
        return [_signed_pair(word, select) for select in (0x4140, 0x4342)]
    if place:
        word = arith.shrui(word, _constant(part * place))
    word = arith.andi(word, _constant((2**part - 1) * 0x01010101))
    magic = _constant(0x43)
    return [_permute_bytes(word, magic, select) for select in (0x4140, 0x4342)]


def _signed_pair(word, select: int):
    """Bytes b -> b - 128: 128 + the low seven bits, less 256 or 128 by the top bit."""
    pair = _permute_bytes(word, _constant(0x43), select)
    low = arith.andi(pair, _constant(0xFF7FFF7F))
    top = arith.andi(arith.xori(pair, _constant(0x00800080)), _constant(0xFF80FF80))
    text = "sub.bf16x2 $0, $1, $2;"
    return llvm.inline_asm(_i32(), [low, top], text, "=r,r,r")


def _level_pairs(word, bits):
    """Eight nibbles -> (pairs of the low nibbles, pairs of the high ones).

    A byte permutation looks up four 3-bit indices in eight bytes at once.
    """
    index = arith.andi(word, _constant(0x77777777))
    top = arith.shrui(arith.andi(word, _constant(0x88888888)), _constant(1))
    blend = arith.ori(top, _constant(0x32103210))
    low, high = [], []
    for half in range(2):
        if half:
            index, blend = (arith.shrui(a, _constant(16)) for a in (index, blend))
        by_byte = [_look(index, blend, (bits >> shift) & 0xFF) for shift in (0, 8)]
        low.append(_permute_bytes(*by_byte, 0x6240))
        high.append(_permute_bytes(*by_byte, 0x7351))
    return low, high


def _look(index, blend, table):
    """Four entries of a table of 16 bytes."""
    quads = [int(np.uint8(q).view("<u4")[0]) for q in table.reshape(4, 4)]
    a, b, c, d = (_constant(q) for q in quads)
    below, above = _permute_bytes(a, b, index), _permute_bytes(c, d, index)
    return _permute_bytes(below, above, blend)


def _permute_bytes(a, b, select):
    """PTX prmt: byte i of the result is byte (nibble i of ``select``) of a, b."""
    select = _constant(select) if isinstance(select, int) else select
    text = "prmt.b32 $0, $1, $2, $3;"
    return llvm.inline_asm(_i32(), [a, b, select], text, "=r,r,r,r")


def _as_pair(word):
    one = vector.broadcast(ir.VectorType.get((1,), _i32()), word)
    return vector.bitcast(ir.VectorType.get((2,), ir.BF16Type.get()), one)


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(value: int):
    signed = value - 2**32 if value >= 2**31 else value
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed))
