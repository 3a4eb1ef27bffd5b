"""What the matmul kernels for Hopper share: tiles, splits of the inputs, results.

They compute out^T = W x^T in tiles of 64 outputs per warpgroup, wgmma's fixed size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

LANES = 64  # rows of W of one warpgroup
TILE = 16  # columns that wgmma multiplies at a time
SHARED = 227 * 1024  # bytes of shared memory that one block may use
PROCESSORS = 132
RESERVED = 4096  # barriers, and the padding between arrays


def require(interpret: bool) -> None:
    """NotImplementedError where neither Hopper nor the interpreter serves."""
    compat.require_hopper(interpret)
    if interpret and compat.VERSION < (0, 11):
        raise NotImplementedError("jax 0.10's interpreter cannot load single columns")


def terms(x):
    """x [..., K] as bfloat16 rows; of wider dtypes the high above the low terms."""
    x = x.reshape(-1, x.shape[-1])
    high = x.astype(jnp.bfloat16)
    if x.dtype == jnp.bfloat16:
        return high
    return jnp.concatenate([high, rest(x).astype(jnp.bfloat16)])


def rest(x):
    """What rounding to bfloat16 takes away, in float32."""
    wide = x.astype(jnp.float32)
    return wide - lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)


def joined(y, x, outputs: int, beside=None):
    """The result for ``x`` from that of its padded terms, and what is added to it."""
    rows = math.prod(x.shape[:-1])
    if x.dtype != jnp.bfloat16:
        y = y[: 2 * rows].reshape(2, -1, outputs).sum(0)
    y = y[:rows] if beside is None else y[:rows] + beside
    return y.astype(x.dtype).reshape(*x.shape[:-1], outputs)


def tiles(shape: tuple[int, ...], dtype, width: int | None = None):
    """Shared memory that the copy engine fills and wgmma reads.

    Swizzled in rows of ``width`` bytes: the largest power of two up to 128 that divides
    the minor axis, unless slices of fewer bytes are to be multiplied.
    """
    size = jnp.dtype(dtype).itemsize
    width = width or shape[-1] * size
    width = min(128, width & -width)
    tiling = plgpu.TilingTransform((8, width // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))


def spread(rows: int, tile: int, outputs: int, steps: int) -> tuple[int, int]:
    """(warpgroups, splits) so that few output tiles still fill the chip.

    Splits of the inputs write float32 parts: cheap for few rows, which want two blocks
    a multiprocessor to hide latencies; for many rows only as many as keep it busy.
    """
    fewest = 2 * PROCESSORS if rows <= 32 else 3 * PROCESSORS // 4
    allowed = [s for s in (1, 2, 4, 8) if steps % s == 0 and steps // s >= 4] or [1]
    wide = outputs % (2 * LANES) == 0
    for warpgroups in (2, 1) if wide else (1,):
        blocks = -(-rows // tile) * outputs // (LANES * warpgroups)
        splits = next((s for s in allowed if blocks * s >= fewest), allowed[-1])
        if blocks * splits >= min(fewest, PROCESSORS):
            return warpgroups, splits
    return warpgroups, splits


def depth(stage: int, tile: int, rows: int, steps: int, room: int = SHARED) -> int:
    """Stages of ``stage`` bytes that fit beside a result of ``tile`` x ``rows``."""
    most = 8 if rows <= 32 else 4
    fit = (room - RESERVED - 4 * tile * rows) // stage
    return max(1, min(most, fit, steps))


def result(warpgroups: int, rows: int, partial: bool):
    """Shared memory from which a tile of the result leaves."""
    if partial:
        return plgpu.SMEM((warpgroups, LANES, rows), jnp.float32)
    swizzle = (plgpu.SwizzleTransform(128),)
    return plgpu.SMEM((warpgroups, rows, LANES), jnp.bfloat16, transforms=swizzle)


def result_type(parts: int, rows: int, outputs: int, partial: bool):
    """The kernel's result: float32 [split, out, row], else bfloat16 [row, out]."""
    if partial:
        return jax.ShapeDtypeStruct((parts, outputs, rows), jnp.float32)
    return jax.ShapeDtypeStruct((rows, outputs), jnp.bfloat16)


def store(total, staged, y, split, outputs, rows, partial: bool) -> None:
    """Write a warpgroup's float32 sums [64, rows] to its place in the result."""
    if partial:
        staged[...] = total
        target = y.at[split, outputs, rows]
    else:
        layout = plgpu.Layout.WGMMA_TRANSPOSED
        turned = plgpu.layout_cast(total.astype(jnp.bfloat16), layout)
        compat.transposed(staged)[...] = turned
        target = y.at[rows, outputs]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, target)
    plgpu.wait_smem_to_gmem(0)


def column(ref, rows, at, layout=None, dtype=jnp.float32):
    """A column of a matrix in device memory, one value per output, as ``dtype``."""
    layout = layout or plgpu.Layout.WGMMA.reduce(1)
    return compat.load(ref.at[rows, at], layout, optimized=False).astype(dtype)


def across(column, width: int):
    """One value per output, over ``width`` columns; a tile [64, width] as it is."""
    if column.ndim == 2:
        return column
    return lax.broadcast_in_dim(column, (LANES, width), [0])


def zeros(rows: int):
    """Float32 sums [64, rows] to start from."""
    nothing = jnp.zeros((LANES, rows), jnp.float32)
    return plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
