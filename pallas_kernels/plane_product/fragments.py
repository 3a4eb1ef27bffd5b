"""Packed bytes of W in registers -> int8 operands of Hopper's wgmma.

Of 16 neighbouring int8 of a row, wgmma wants four neighbours in each of four threads. A
thread loads four neighbouring bytes of the widest plane, and what the others store for
the same inputs: then one field of each byte, masked, is a register of an operand as it
is, and nothing is exchanged between threads. x is put into the order of the fields
(``by_field``) instead. All arithmetic is on 32-bit words.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import compat
from pallas_kernels.planes import parts, spans
from pallas_kernels.quantized_matmul.fragments import (
    ROW,
    ROW_AXIS,
    Word,
    by_row,
    words_of,
)

CHUNK = 128  # inputs of an operand: a swizzled row of x is 128 bytes
TILE = 16  # columns of an operand's register
OUT = plgpu.Layout.WGMMA_8BIT
TOP = 0x80808080
NIBBLES = 0x0F0F0F0F


def layout(count: int):
    """OUT, but a thread has ``count`` neighbours where it has four there."""
    wide = 4 * count
    tiles = ((64, wide), (16, wide), (8, wide), (count,))
    return plgpu.Layout.TILED(
        Tiling(tiles), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
    )


def load(plane, part: int, widest: int):
    """Bytes of a plane [64, bytes]: a thread's are of its inputs in the widest."""
    return compat.load(plane, layout(4 * part // widest))


def by_field(a, places: int):
    """The minor axis in chunks of 128, first what is first in its byte, and so on."""
    chunks = a.reshape(*a.shape[:-1], -1, CHUNK // places, places)
    return jnp.swapaxes(chunks, -1, -2).reshape(a.shape)


def centred(words: list, bits: int, *, interpret: bool):
    """(code - 2^(bits - 1)) 2^(8 - bits), int8 [64, 128] in the order of the fields.

    ``words`` are a chunk's bytes of each plane [64, 16 part], uint8, as ``load`` gives.
    """
    if interpret:
        return by_field(_plain_centred(words, bits), 8 // parts(bits)[0])

    def peel(words, _):
        return centred_words(words, bits)

    return _operand(words, [], peel)


def shifted(words, zero: list, *, interpret: bool):
    """Codes of four bits less the zero points of their rows, int8 [64, 128].

    ``words`` uint8 [64, 64]; ``zero`` holds columns [64] of int32 below 128, one for
    each equal share of the inputs.
    """
    if interpret:
        return by_field(_plain_nibbles(words) - _plain_wide(zero), 2).astype(jnp.int8)
    terms = [-(z * jnp.int32(0x01010101)) for z in zero]

    def peel(words, columns):
        return shifted_words(words[0], columns[0])

    return _operand([words], [terms], peel)


def scaled(words, scale: list, zero: list, *, interpret: bool):
    """(code - zero) scale where that is an int8, else the same modulo 256.

    As ``shifted``, with columns [64] of int32 for the scales too.
    """
    if interpret:
        codes = _plain_nibbles(words) - _plain_wide(zero)
        low = by_field(codes * _plain_wide(scale), 2) & 255
        return (low - ((low & 128) << 1)).astype(jnp.int8)
    byte = jnp.int32(255)
    factors = [s & byte for s in scale]
    pairs = zip(scale, zero, strict=True)
    terms = [(-(s * z) & byte) * jnp.int32(0x00010001) for s, z in pairs]

    def peel(words, columns):
        return scaled_words(words[0], *columns)

    return _operand([words], [factors, terms], peel)


def centred_words(words: list, bits: int) -> list:
    """Words of the planes of a code -> for each place, the codes in bytes, signed."""
    widths, made = parts(bits), []
    fields = [
        spread(word, widths[0] // part)
        for word, part in zip(words, widths, strict=True)
    ]
    for place in range(8 // widths[0]):
        total = None
        for word, (part, low) in zip(fields, spans(bits), strict=True):
            low += 8 - bits  # at the top of a byte
            by = part * place - low
            moved = word >> by if by > 0 else word << -by if by < 0 else word
            moved = moved & ((2**part - 1) << low) * 0x01010101
            total = moved if total is None else total | moved
        made.append(total ^ TOP)  # code - 2^(bits - 1), in two's complement
    return made


def spread(word, ratio: int):
    """32 / ratio bits in four equal parts, each moved to a byte of its own."""
    if ratio == 2:
        word = (word | (word << 8)) & 0x00FF00FF
        return (word | (word << 4)) & NIBBLES
    if ratio == 4:
        word = (word | (word << 12)) & 0x000F000F
        return (word | (word << 6)) & 0x03030303
    return word


def shifted_words(word, term) -> list:
    """Eight nibbles plus a term of four bytes in -127..0: no borrow passes the tops."""
    halves = (word & NIBBLES, (word >> 4) & NIBBLES)
    return [affine(half | TOP, None, term) ^ TOP for half in halves]


def scaled_words(word, factor, term) -> list:
    """Eight nibbles times ``factor``, plus ``term`` (both of a byte), modulo 256.

    Two products of 12 bits share a word, so that none runs into the other; ``term``
    stands twice, 16 bits apart.
    """
    made, above = [], term << 8
    for half in (word, word >> 4):
        even = affine(half & 0x000F000F, factor, term)
        odd = affine(half & 0x0F000F00, factor, above)
        made.append(even.permuted(odd, 0x7250))
    return made


def affine(word: Word, factor: Word | None, term: Word) -> Word:
    """word factor + term, modulo 2^32 (no ``factor``: 1)."""
    value = word.value
    if factor is not None:
        value = arith.muli(value, factor.value)
    return Word(arith.addi(value, term.value))


def _operand(words: list, columns: list, peel):
    """An operand of the words that ``peel(words, columns)`` makes for each place.

    ``columns`` are lists of columns [64]: a row's value for each equal share of the
    inputs.
    """
    count = [len(each) for each in columns]
    widths = [4 * word.shape[1] // words[0].shape[1] for word in words]
    places = CHUNK // words[0].shape[1]
    shape = words[0].shape[0], CHUNK
    kind = plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=OUT)
    layouts = [layout(width) for width in widths] + [ROW] * sum(count)

    @plgpu.inline_mgpu(arg_types=tuple(layouts), return_type=kind)
    def build(_, *arrays):
        planes, rest = arrays[: len(words)], list(arrays[len(words) :])
        shares = [[rest.pop(0) for _ in range(n)] for n in count]
        registers = planes[0].registers
        tiles = registers.shape[1]
        out = np.empty(OUT.to_mgpu().registers_shape(shape), object)
        for index in np.ndindex(registers.shape):
            at, row = index[1], index[ROW_AXIS]
            own = [by_row(each[at * len(each) // tiles], row) for each in shares]
            held = [words_of(plane.registers[index])[0] for plane in planes]
            for place, word in enumerate(peel(held, own)):
                out[(index[0], place * tiles + at, *index[2:])] = _bytes(word)
        assert out.shape[1] == places * tiles
        return compat.in_registers(out, OUT.to_mgpu(), signed=True)

    return build(*words, *(column for each in columns for column in each))


def _bytes(word: Word):
    """The register as four int8."""
    kind, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
    one = vector.broadcast(ir.VectorType.get((1,), kind), word.value)
    return vector.bitcast(ir.VectorType.get((4,), byte), one)


def _plain_centred(words: list, bits: int):
    total = 0
    for word, part in zip(words, parts(bits), strict=True):
        total = (total << part) | _plain_fields(word, part)
    return ((total - 2 ** (bits - 1)) << (8 - bits)).astype(jnp.int8)


def _plain_nibbles(words):
    return _plain_fields(words, 4)


def _plain_fields(words, part: int):
    """Codes of ``part`` bits in the order of the inputs, int32."""
    shifts = part * jnp.arange(8 // part)
    fields = words.astype(jnp.int32)[..., None] >> shifts[None, None]
    return (fields & (2**part - 1)).reshape(len(words), -1)


def _plain_wide(columns: list):
    return jnp.repeat(jnp.stack(columns, 1), CHUNK // len(columns), 1)
