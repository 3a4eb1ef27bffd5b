"""Bytes of five trits in shared memory -> bfloat16 operands of Hopper's wgmma.

A thread reads 16 neighbouring bytes of a row, a part of 4 bytes of each of wgmma's
tiles of 16 columns, and x is put into that order (``in_order``). 0x6400 | v is the
float16 1024 + v, and one fused multiplication and addition of two of them divides both
by three, for its rounding is the floor: 1024 + v // 3. The quotients less three times
the next ones are trits. A trit's float16, 0 or +-1, is as a bfloat16 0 or +-1/128.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import compat
from pallas_kernels.hopper import LANES
from pallas_kernels.quantized_matmul.fragments import OUT, Word, words_of

HELD = 5  # trits in a byte
CHUNK = 64  # bytes of a row that four threads read
OWN = CHUNK // 4 * HELD  # neighbouring inputs of a thread
FACTOR = 128.0  # operands are trits over this
# Places in the byte of an operand: while one is multiplied the next one is made, and
# both wait in registers.
GROUPS = (3, 2)
WIDTHS = tuple(places * CHUNK for places in GROUPS)
KINDS = tuple(
    plgpu.ShapeDtypeStruct((LANES, width), jnp.bfloat16, layout=OUT) for width in WIDTHS
)

THIRD, ROUNDING = 0x35553555, 0x61556155  # float16 0.33325 and 682.5, twice
MINUS_3, AFTER, LAST = 0xC200C200, 0x67FF67FF, 0xE401E401  # -3, 2047, -1025


def in_order(x):
    """x [rows, inputs], each 64 bytes by their place in the byte.

    They are (thread, tile, half, element); wgmma has the thread after the half.
    """
    a = x.reshape(len(x), -1, 4, 4, 2, 2, HELD)
    return a.transpose(0, 1, 6, 3, 4, 2, 5).reshape(len(x), -1)


def regions(block: int | None) -> int:
    """Equal parts of a thread's inputs, none of which has inputs of two blocks."""
    return 1 if block is None else OWN // math.gcd(OWN, block)


def trits(tile, place, chunk: int, *, interpret: bool):
    """Operands of a chunk of ``tile``: trits / 128, by their place in the byte.

    ``tile`` [folded, rows / folded, bytes] in shared memory.
    """
    if interpret:
        return _plain_operands(_plain_trits(tile, place, chunk) / FACTOR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=KINDS)
    def peel(_, tile):
        return _fragments([tile], chunk, lambda words, *_: trit_pairs(*words))

    return peel(tile)


def scaled_trits(tiles, place, chunk: int, scales, count: int, *, interpret: bool):
    """The same of sums over planes of scale times trit, in bfloat16.

    ``scales`` are those of each plane, as ``region_scales`` gives them for ``count``
    regions.
    """
    if interpret:
        total = jnp.zeros((HELD, LANES, CHUNK), jnp.float32)
        for tile, scale in zip(tiles, scales, strict=True):
            found = _plain_trits(tile, place, chunk) / FACTOR
            total += found * scale.astype(jnp.float32)
        return _plain_operands(total)
    kinds = (plgpu.RefType(),) * len(tiles) + (OUT,) * len(scales)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=KINDS)
    def add(_, *arrays):
        stored, by = arrays[: len(tiles)], arrays[len(tiles) :]

        def sums(words, row, tile):
            own = [_own_scales(array, row)[:count] for array in by]
            return scaled_pairs(words, own, tile)

        return _fragments(stored, chunk, sums)

    return add(*tiles, *scales)


def region_scales(ref, rows, first, block: int | None, count: int, *, interpret: bool):
    """Scales of the regions of a chunk that begins with the input ``first``, for rows.

    uint32 [64, 8n] of two equal bfloat16, times 128: a thread's registers hold those of
    its own regions. ``ref`` [outputs, blocks].
    """
    last = ref.shape[1] - 1
    size = block or OWN  # irrelevant where a block has all inputs
    if interpret:
        inputs = jnp.arange(CHUNK) * HELD + jnp.arange(HELD)[:, None]
        at = jnp.minimum((first + inputs) // size, last)
        found = (ref[rows].astype(jnp.float32) * FACTOR).astype(jnp.bfloat16)
        return jnp.take(found, at, axis=1).swapaxes(0, 1)
    shape = (LANES, 8 * -(-count // 2))
    kind = plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=OUT)
    scalar = plgpu.Layout.WG_SPLAT(())

    def column(start, region: int):
        """The block of a region, or the last one where it is beyond the inputs."""
        at = arith.addi(start, _integer(region * OWN // count))
        return arith.minui(arith.divui(at, _integer(size)), _integer(last))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar), return_type=kind)
    def load(_, ref, first):
        row, part = _own_row(LANES), _own_part()
        start = arith.addi(first.registers.item(), arith.muli(part, _integer(OWN)))
        made = np.empty(OUT.to_mgpu().registers_shape(shape), object)
        for pair in range(made.shape[1]):
            for half in range(2):
                words = [
                    _twice(_scale(ref, row, half, column(start, region)))
                    for region in (2 * pair, 2 * pair + 1)
                ]
                made[_index(pair, half)] = vector.from_elements(
                    ir.VectorType.get((2,), _i32()), words
                )
        return _array(made, signed=False)

    return load(ref.at[rows], first)


def scale_tile(ref, width: int, *, interpret: bool):
    """Scales [64, blocks] in device memory, over and over, as float32 [64, width].

    The number of blocks is a power of two.
    """
    count = ref.shape[1]
    if interpret:
        return jnp.tile(ref[...].astype(jnp.float32), (1, width // count))
    kind = plgpu.ShapeDtypeStruct((LANES, width), jnp.float32, layout=OUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=kind)
    def load(_, ref):
        row, part = _own_row(LANES), _own_part()
        made = np.empty(OUT.to_mgpu().registers_shape((LANES, width)), object)
        pair = arith.shli(part, _integer(1))
        for half in range(2):
            for i in range(max(1, count // 8)):
                columns = [arith.addi(pair, _integer(8 * i + e)) for e in range(2)]
                columns = [arith.andi(c, _integer(count - 1)) for c in columns]
                found = [_scale(ref, row, half, column) for column in columns]
                both = vector.from_elements(ir.VectorType.get((2,), _f32()), found)
                for j in range(i, made.shape[1], max(1, count // 8)):
                    made[_index(j, half)] = both
        return _array(made)

    return load(ref)


def trit_pairs(word) -> list[list]:
    """Four bytes -> for each place, two words of two trits, as float16."""
    found = [[] for _ in range(HELD)]
    for select in (0x4140, 0x4342):
        quotient = word.permuted(word.constant(0x64), select)
        for place in range(HELD - 1):
            below, quotient = quotient, fused("f16", quotient, THIRD, ROUNDING)
            rest = fused("f16", quotient, MINUS_3, below)  # trit - 2047
            found[place].append(fused("f16", rest, None, AFTER))
        found[-1].append(fused("f16", quotient, None, LAST))
    return found


def scaled_pairs(words: list, scales: list[list], tile: int) -> list[list]:
    """The same of sums over planes of trits / 128 times scales, as bfloat16.

    ``words`` are a plane's each, ``scales`` those of its regions in a thread's inputs,
    of which ``tile`` is the part of four bytes.
    """
    planes = [trit_pairs(word) for word in words]
    size = OWN // len(scales[0])
    found = [[] for _ in range(HELD)]
    for place in range(HELD):
        for half in range(2):
            first = (tile * 4 + half * 2) * HELD + place
            one, other = first // size, (first + HELD) // size
            total = 0
            for pairs, own in zip(planes, scales, strict=True):
                by = own[one]
                if other != one:
                    by = by.permuted(own[other], 0x7610)
                total = fused("bf16", pairs[place][half], by, total)
            found[place].append(total)
    return found


def fused(kind: str, value, factor, term):
    """value factor + term of pairs of floats of 16 bits, rounded once (None: 1)."""
    name = "add" if factor is None else "fma"
    operands = [value, *([] if factor is None else [factor]), term]
    words = [(Word.constant(a) if isinstance(a, int) else a).value for a in operands]
    inputs = ", ".join(f"${i + 1}" for i in range(len(words)))
    text = f"{name}.rn.{kind}x2 $0, {inputs};"
    return Word(llvm.inline_asm(_i32(), words, text, "=r" + ",r" * len(words)))


def _fragments(tiles: list, chunk: int, function):
    """Operands from ``function(words of each plane, row, tile)``.

    It returns for each place two words: a thread's columns of one of wgmma's tiles.
    """
    layout = OUT.to_mgpu()
    made = [np.empty(layout.registers_shape(kind.shape), object) for kind in KINDS]
    at = [
        (out, place) for out, n in zip(made, GROUPS, strict=True) for place in range(n)
    ]
    stored = [_own_words(tile, chunk) for tile in tiles]
    for row in range(2):
        for tile in range(4):
            found = function([words[row][tile] for words in stored], row, tile)
            for (out, place), pairs in zip(at, found, strict=True):
                for half, pair in enumerate(pairs):
                    column = 2 * (4 * place + tile) + half
                    out[_index(column, row)] = pair.floats()
    return tuple(_array(out) for out in made)


def _own_words(tile, chunk: int) -> list[list]:
    """This thread's 16 bytes of a chunk of its upper and of its lower row, in words."""
    folded, count, width = ir.MemRefType(tile.type).shape
    base, upper = utils.memref_ptr(tile), _own_row()
    four = ir.VectorType.get((4,), _i32())
    found = []
    for lower in (0, 8):
        row = arith.addi(upper, _integer(lower))
        within = arith.muli(arith.remui(row, _integer(folded)), _integer(count * width))
        below = arith.muli(arith.divui(row, _integer(folded)), _integer(width))
        at = arith.addi(within, below)
        column = arith.muli(_own_part(), _integer(CHUNK // 4))
        at = arith.addi(at, arith.addi(column, _integer(chunk * CHUNK)))
        place = utils.getelementptr(base, [at], ir.IntegerType.get_signless(8))
        found.append(words_of(llvm.load(four, place, alignment=16)))
    return found


def _own_scales(array, row: int) -> list:
    """What a thread holds of an array for its upper or its lower row."""
    pairs = range(array.registers.shape[1])
    return [word for i in pairs for word in words_of(array.registers[_index(i, row)])]


def _array(registers, signed: bool | None = None):
    return compat.in_registers(registers, OUT.to_mgpu(), signed)


def _index(pair: int, row: int) -> tuple[int, ...]:
    """Of a register of wgmma's layout: a pair of columns, upper or lower row."""
    return (0, pair, 0, 0, row, 0, 0, 0, 0)


def _own_row(rows: int | None = None):
    """A thread's upper row of a block's tile, or of a warpgroup's ``rows``."""
    thread = utils.thread_idx()
    warp = arith.shli(arith.shrui(thread, _integer(5)), _integer(4))
    row = arith.addi(warp, arith.andi(arith.shrui(thread, _integer(2)), _integer(7)))
    return row if rows is None else arith.andi(row, _integer(rows - 1))


def _own_part():
    """Which of the four threads that share a row this one is."""
    return arith.andi(utils.thread_idx(), _integer(3))


def _scale(ref, upper, row: int, column):
    """ref[upper or lower row, column] in device memory as float32."""
    at = [arith.addi(upper, _integer(8 * row)), column]
    value = memref.load(ref, [arith.index_cast(ir.IndexType.get(), i) for i in at])
    return value if value.type == _f32() else arith.extf(_f32(), value)


def _twice(value):
    """A float32 times 128, rounded to bfloat16, twice in a word."""
    value = arith.mulf(value, arith.constant(_f32(), ir.FloatAttr.get_f32(FACTOR)))
    text = "cvt.rn.bf16x2.f32 $0, $1, $1;"
    return llvm.inline_asm(_i32(), [value], text, "=r,f")


def _integer(value: int):
    return Word.constant(value).value


def _i32():
    return ir.IntegerType.get_signless(32)


def _f32():
    return ir.F32Type.get()


def _plain_trits(tile, place, chunk: int):
    """Trits of a warpgroup's rows and a chunk, for each place in a byte [5, 64, 64]."""
    folded = tile.shape[0]
    size = LANES // folded
    rows = pl.ds(place.warpgroup * size, size)
    stored = tile[:, rows, chunk * CHUNK : (chunk + 1) * CHUNK]
    stored = stored.swapaxes(0, 1).reshape(LANES, CHUNK).astype(jnp.int32)
    found = [stored // 3**i % 3 - 1 for i in range(HELD)]
    return jnp.stack(found).astype(jnp.float32)


def _plain_operands(a) -> list:
    """[place, row, byte] in wgmma's order."""
    a = a.astype(jnp.bfloat16).reshape(HELD, LANES, 4, 4, 2, 2)
    a = a.transpose(1, 0, 3, 4, 2, 5).reshape(LANES, -1)
    return [a[:, : WIDTHS[0]], a[:, WIDTHS[0] :]]
