"""CPU: a block of inputs at a time becomes float32, so that caches hold the weight.

XLA's whole-array dequantization writes the dense weight to memory and its products in
bfloat16 are ten times slower than in float32. For few rows, a loop over blocks of
inputs multiplies raw codes and applies zero and scale to the partial sums; for many
rows, a loop over outputs makes slices of the weight. No Pallas here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantized_matmul.reference import corrected, parts

FEW = 32  # rows up to which products of raw codes win
SLICE = 16  # outputs at a time for many rows: 16 x 4096 floats stay in a level-2 cache
STEP = 128  # inputs at a time where all inputs share one scale
SMALL = 2**15  # weights below which the reference is as good


def quantized_matmul(
    x,
    planes,
    scale,
    zero=None,
    low_rank=None,
    *,
    bits: int,
    block: int | None,
    levels: tuple[float, ...] | None = None,
    offset: float | None = None,
    interpret: bool = False,
):
    """The reference's meaning in loops; NotImplementedError where those do not win."""
    del interpret  # nothing here is interpreted
    outputs, inputs = len(planes[0]), x.shape[-1]
    if levels is not None or len(parts(bits)) > 1:
        raise NotImplementedError("tables and several planes gain nothing from blocks")
    if outputs * inputs < SMALL:
        raise NotImplementedError(f"{outputs} x {inputs} weights fit the cache")
    rows = x.reshape(-1, inputs).astype(jnp.float32)
    options = {"bits": bits, "block": block, "offset": offset}
    few = 0 < len(rows) <= FEW
    run = _by_inputs if few else _by_outputs
    y = run(rows, planes[0], scale, zero, **options).astype(jnp.float32)
    y = (y + corrected(rows, low_rank)).reshape(*x.shape[:-1], outputs)
    return y.astype(x.dtype)


def _by_outputs(x, plane, scale, zero, *, bits, block, offset) -> Array:
    """y of a slice of outputs at a time, from that slice of the weight in float32."""
    (rows, inputs), (outputs, blocks) = x.shape, scale.shape
    phases = 8 // bits
    if outputs % SLICE or not rows or inputs % phases:
        raise NotImplementedError(
            f"{rows} rows, {inputs} inputs, {outputs} outputs: accepted are at least "
            f"one row and multiples of {phases} and {SLICE}"
        )
    if blocks > 1 and (inputs % block or block % phases):
        raise NotImplementedError(f"{inputs} inputs are no whole blocks of {block}")
    middle = 2.0 ** (bits - 1) if offset is None else float(offset)
    ordered = _by_phase(x, inputs, phases)[0]

    def step(i, y):
        cut = lambda a: lax.dynamic_slice_in_dim(a, i * SLICE, SLICE)  # noqa: E731
        own = cut(scale).astype(jnp.float32)[:, None, :, None]
        shift = middle if zero is None else cut(zero).astype(y.dtype)[:, None, :, None]
        codes = _codes(cut(plane), bits, 0, inputs)
        w = (codes.reshape(SLICE, phases, blocks, -1) - shift) * own
        slice_of_y = ordered @ w.reshape(SLICE, inputs).T
        return lax.dynamic_update_slice(y, slice_of_y, (0, i * SLICE))

    empty = jnp.zeros((rows, outputs), jnp.float32)
    return lax.fori_loop(0, outputs // SLICE, step, empty)


def _by_inputs(x, plane, scale, zero, *, bits, block, offset) -> Array:
    """y += scale_b (x_b codes_b^T - zero_b sum(x_b)) for each block of inputs b."""
    rows, inputs = x.shape
    blocks = scale.shape[-1]
    size = STEP if blocks == 1 else block
    if inputs % size or size % (8 // bits):
        raise NotImplementedError(f"{inputs} inputs are no whole blocks of {size}")
    middle = 2.0 ** (bits - 1) if offset is None else float(offset)
    scales = scale.astype(jnp.float32).T
    zeros = None if zero is None else zero.astype(jnp.float32).T
    ordered = _by_phase(x, size, 8 // bits)
    sums = ordered.sum(-1)

    def step(b, y):
        own = 0 if blocks == 1 else b
        piece = lax.dynamic_index_in_dim(ordered, b, keepdims=False)
        codes = piece @ _codes(plane, bits, b, size).T
        total = lax.dynamic_index_in_dim(sums, b, keepdims=False)
        shift = middle if zeros is None else lax.dynamic_index_in_dim(zeros, own)
        factor = lax.dynamic_index_in_dim(scales, own)
        return y + factor * (codes - total[:, None] * shift)

    empty = jnp.zeros((rows, scale.shape[0]), jnp.float32)
    return lax.fori_loop(0, inputs // size, step, empty)


def _by_phase(x, size: int, phases: int) -> Array:
    """[blocks, rows, size], each block in the order that ``_codes`` has."""
    rows, inputs = x.shape
    split = x.reshape(rows, inputs // size, size // phases, phases)
    return split.transpose(1, 0, 3, 2).reshape(-1, rows, size)


def _codes(plane, part: int, b, size: int) -> Array:
    """The codes of one block of inputs, [out, size], all of one shift together."""
    width = size * part // 8
    piece = lax.dynamic_slice_in_dim(plane, b * width, width, axis=1)
    mask = jnp.uint8(2**part - 1)
    shifted = [(piece >> jnp.uint8(s)) & mask for s in range(0, 8, part)]
    return jnp.concatenate(shifted, axis=1).astype(jnp.float32)
