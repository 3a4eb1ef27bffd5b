"""Packed codes in a warpgroup's registers: floats, and scales of their channels.

Codes are read two bytes at a time. Those at the same place of every two bytes are
neighbours in what they become: column j * words + w is the code at place j of word w.
A code stays in its place of the byte, so it counts 2^place times; whoever prepares the
other operand divides by that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Replicated, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.fragments import Word, words_of

HALF_1024 = 0x6400  # the bits of float16 1024; its low 10 bits count units of one
VECTOR = 8  # channels of a load
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized cache: ``slots`` share a scale, or ``blocks`` scale one slot.

    More than one of ``slots``: they have a scale per channel.
    """

    bits: int
    slots: int
    blocks: int
    zeros: bool

    @property
    def places(self) -> int:
        """Codes in two bytes."""
        return 16 // self.bits

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def per_channel(self) -> bool:
        return self.slots > 1


def lows(bits: int) -> list[int]:
    """Where in its byte the code at each place of two bytes begins."""
    return [place * bits % 8 for place in range(16 // bits)]


def worth(bits: int):
    """[places, 1]: what makes up for the place of each code in its byte."""
    return 2.0 ** -jnp.asarray(lows(bits), jnp.float32)[:, None]


def in_order(x, bits: int):
    """The minor axis in the order of the codes' floats."""
    x = x.reshape(*x.shape[:-1], -1, 16 // bits)
    return x.swapaxes(-1, -2)


def words(planes):
    """Codes two bytes at a time, [..., width bits / 16]; moves nothing."""
    (plane,) = planes
    return lax.bitcast_convert_type(plane.reshape(*plane.shape[:-1], -1, 2), jnp.uint16)


def floats(codes, bits: int, nothing, *, middle: bool, interpret: bool):
    """Words [64, n] -> float16 [64, places n], exact.

    2^place (code - middle code), or without ``middle`` 1024 + 2^place code. ``nothing``
    is an int32 zero that the compiler takes for unknown: or-ed to a constant it keeps
    that in a register, where it would else be set anew for each pair of codes.
    """
    places = 16 // bits
    if interpret:
        wide = codes.astype(jnp.int32)
        at = [(wide >> bits * j) & (2**bits - 1) for j in range(places)]
        parts = [
            (c - 2 ** (bits - 1)) * 2**low if middle else (c << low) + 1024
            for c, low in zip(at, lows(bits), strict=True)
        ]
        return jnp.concatenate(parts, axis=1).astype(jnp.float16)
    rows, count = codes.shape
    kind = plgpu.ShapeDtypeStruct((rows, places * count), jnp.float16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.Layout.WG_SPLAT), return_type=kind)
    def expand(_, array, nothing):
        magic = Word(nothing.registers.item()) | HALF_1024 * 0x00010001
        each = [np.empty(array.registers.shape, object) for _ in range(places)]
        for index, register in np.ndenumerate(array.registers):
            (word,) = words_of(register)
            for j, out in enumerate(each):
                out[index] = _pair(word, magic, bits, j, middle)
        return compat.in_registers(np.concatenate(each, axis=1), array.layout)

    return expand(codes, nothing)


def halves_of(word, magic, bits: int, j: int):
    """The codes at place j of two words, in the low bits of the halves of ``magic``."""
    if bits == 8:
        return word.permuted(magic, 0x5351 if j else 0x5250)
    word = word >> 8 if j * bits >= 8 else word
    return word & ((2**bits - 1) << lows(bits)[j]) * 0x00010001 | magic


def _pair(word, magic, bits: int, j: int, middle: bool):
    """Those as two float16."""
    pair = halves_of(word, magic, bits, j).value
    kind = ir.VectorType.get((2,), ir.F16Type.get())
    one = ir.VectorType.get((1,), pair.type)
    pair = vector.bitcast(kind, vector.broadcast(one, pair))
    if not middle:
        return pair
    less = 1024.0 + 2 ** (bits - 1 + lows(bits)[j])
    less = ir.FloatAttr.get(ir.F16Type.get(), less)
    less = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, less))
    return arith.subf(pair, less)


def joined(arrays, axis: int, layout, *, interpret: bool):
    """Arrays of whole tiles of one ``layout``, side by side; moves nothing."""
    if len(arrays) == 1:
        return arrays[0]
    if interpret:
        return jnp.concatenate(arrays, axis)
    shape = list(arrays[0].shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    kind = plgpu.ShapeDtypeStruct(tuple(shape), arrays[0].dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=kind)
    def join(_, *parts):
        registers = np.concatenate([part.registers for part in parts], axis)
        return compat.in_registers(registers, parts[0].layout, parts[0].is_signed)

    return join(*arrays)


@dataclasses.dataclass(frozen=True)
class Channels:
    """How a warpgroup holds a head's channels: two words of codes to a thread.

    ``whole`` is the layout of [width] in the order of the cache, ``row`` that of the
    [words] at one place of each word, ``pair`` that of [columns, words]: the eight
    lanes that share channels in ``row`` have a column each.
    """

    places: int
    words: int
    whole: Any
    row: Any
    pair: Any

    @classmethod
    def of(cls, bits: int, width: int) -> Channels:
        places, count = 16 // bits, width * bits // 16
        warps, both = 4 if count % 32 == 0 else 2, 2 * places
        spare = (Replicated(4 // warps),) if warps < 4 else ()
        tiles = [(4 * warps * both,), (4 * both,), (both,)]
        lane = -2
        if both > VECTOR:
            tiles, lane = [*tiles, (VECTOR,)], -3
        whole = plgpu.Layout.TILED(
            Tiling(tuple(tiles)),
            warp_dims=(lane - 1, *spare),
            lane_dims=(Replicated(8), lane),
            vector_dim=-1,
        )
        pair = plgpu.Layout.TILED(
            Tiling(((8, 8 * warps), (8, 8), (2,))),
            warp_dims=(-4, *spare),
            lane_dims=(-3, -2),
            vector_dim=-1,
        )
        return cls(places, count, whole, pair.reduce(0), pair)

    def over_heads(self, values, columns: int):
        """[words] in ``row`` -> [columns, words] in ``pair``."""
        spread = lax.broadcast_in_dim(values, (columns, self.words), [1])
        return plgpu.layout_cast(spread, self.pair)

    def parts(self, values, *, interpret: bool) -> list:
        """[width] in the cache's order -> [words] for each place of a word."""
        if interpret:
            return list(values.reshape(self.words, self.places).T)
        kind = plgpu.ShapeDtypeStruct((self.words,), values.dtype, layout=self.row)

        @plgpu.inline_mgpu(arg_types=(self.whole,), return_type=[kind] * self.places)
        def cut(_, array):
            layout = self.row.to_mgpu()
            outs = np.empty((self.places, *layout.registers_shape((self.words,))), "O")
            flat = outs.reshape(self.places, -1)
            held = array.registers.reshape(flat.shape[1], -1)
            for at, loaded in enumerate(held):
                for j in range(self.places):
                    ends = [j, self.places + j]
                    flat[j, at] = vector.shuffle(loaded[0], loaded[-1], ends)
            return [compat.in_registers(out, layout, array.is_signed) for out in outs]

        return cut(values)
