"""What each thread of a warpgroup reads by itself: Mosaic knows no gather.

A line has 128 elements, one for each thread.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.fragments import words_of

THREADS = 128
LINE = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
WIDE = 16  # bytes that a thread loads at once


def gather(ref, place, *, interpret: bool) -> list:
    """ref[place]: a line for each column of ``ref`` [n] or [n, columns].

    ``ref`` is in device memory, a row of it contiguous and aligned to its own size, or
    to 16 bytes where it is longer.
    """
    columns = math.prod(ref.shape[1:])
    if interpret:
        return list(ref[...].reshape(-1, columns)[place].T)
    kind = plgpu.ShapeDtypeStruct(place.shape, ref.dtype, layout=LINE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LINE), return_type=[kind] * columns)
    def fetch(_, memory, places):
        element = ir.MemRefType(memory.type).element_type
        row = ir.VectorType.get((columns,), element)
        at = utils.getelementptr(utils.memref_ptr(memory), [_item(places)], row)
        size = columns * ref.dtype.itemsize
        found = llvm.load(row, at, alignment=min(WIDE, size))
        return [_line(_element(found, i), ref.dtype) for i in range(columns)]

    return fetch(ref, place)


def largest(line, *, interpret: bool):
    """The largest element of a line of int32: in each warp of its own 32."""
    if interpret:
        return jnp.max(line)
    kind = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(LINE,), return_type=kind)
    def reduce(_, line):
        own, text = _item(line), "redux.sync.max.s32 $0, $1, 0xffffffff;"
        found = llvm.inline_asm(own.type, [own], text, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return reduce(line)


def _item(line):
    """The only element that a thread has, of 32 bits."""
    return words_of(line.registers.item())[0].value


def _element(row, index: int):
    """Element ``index`` as a register of one."""
    one = ir.VectorType.get((1,), ir.VectorType(row.type).element_type)
    return vector.extract_strided_slice(one, row, [index], [1], [1])


def _line(register, dtype):
    registers = np.array([register], object)
    signed = False if jnp.issubdtype(dtype, jnp.unsignedinteger) else None
    return compat.in_registers(registers, LINE.to_mgpu(), signed)
