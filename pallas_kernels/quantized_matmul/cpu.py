"""CPU: plain JAX in the shapes that XLA turns into tight loops. No Pallas here.

XLA's whole-array dequantization writes the dense weight to memory, and its products in
bfloat16 are ten times slower than in float32. Up to four rows (``_by_lanes``) read the
packed bytes once, at the speed of the memory; a few multiply raw codes in a loop over
blocks of inputs and apply zero and scale to the partial sums; many multiply slices of
the weight that a cache holds, in a loop over outputs.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.quantized_matmul.reference import corrected, parts

LANES = 8  # bytes side by side: one vector of floats
VECTORS, TERMS = 32, 64  # of bytes, and of codes, that one pass adds up at most
LINE = 4  # rows up to which lanes win
FEW = 32  # rows up to which products of raw codes win
SLICE = 16  # outputs at a time for many rows: 16 x 4096 floats stay in a level-2 cache
STEP = 128  # inputs at a time where all inputs share one scale
SMALL = 2**15  # weights below which the reference is as good
LARGE = 2**20  # weights from which lanes are worth the second that they compile for


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
    if levels is not None:
        raise NotImplementedError("tables gain nothing from blocks")
    if outputs * inputs < SMALL:
        raise NotImplementedError(f"{outputs} x {inputs} weights fit the cache")
    rows = x.reshape(-1, inputs).astype(jnp.float32)
    middle = 2.0 ** (bits - 1) if offset is None else float(offset)
    y = _product(rows, planes, scale, zero, bits=bits, block=block, middle=middle)
    y = (y + corrected(rows, low_rank)).reshape(*x.shape[:-1], outputs)
    return y.astype(x.dtype)


def _product(x, planes, scale, zero, *, bits, block, middle) -> Array:
    rows, large = len(x), len(scale) * x.shape[-1] >= LARGE
    fits = (_fits(x.shape[-1], scale, part) for part in parts(bits))
    if 0 < rows <= LINE and large and all(fits):
        return _by_lanes(x, planes, scale, zero, bits=bits, middle=middle)
    if len(planes) > 1:
        raise NotImplementedError("several planes gain nothing from blocks")
    run = _by_inputs if 0 < rows <= FEW else _by_outputs
    y = run(x, planes[0], scale, zero, bits=bits, block=block, middle=middle)
    return y.astype(jnp.float32)


def _fits(inputs: int, scale, part: int) -> bool:
    """Whether vectors of bytes of ``part``-bit codes fill whole blocks of inputs."""
    blocks = scale.shape[-1]
    return not inputs % blocks and not inputs // blocks % (LANES * 8 // part)


def _by_lanes(x, planes, scale, zero, *, bits, middle) -> Array:
    """y = sum_b scale_b (x_b codes_b^T - zero_b sum(x_b)); codes: sum of 2^low part."""
    scale = scale.astype(jnp.float32)
    shift = scale * (middle if zero is None else zero.astype(jnp.float32))
    y = -x.reshape(len(x), scale.shape[-1], -1).sum(-1) @ shift.T
    low = 0
    for part, plane in zip(reversed(parts(bits)), reversed(planes), strict=True):
        y += 2.0**low * _lanes(x, plane, scale, part)
        low += part
    return y


def _lanes(x, plane, scale, part: int) -> Array:
    """sum_b scale_b (x_b codes_b^T) for the codes of one plane.

    Written for XLA's CPU compiler: one loop over outputs, passes and lanes without a
    gather or a reduction in it becomes vector code that reads each row of bytes from
    end to end. A pass adds up some vectors of 8 bytes.
    """
    (rows, inputs), (outputs, blocks), phases = x.shape, scale.shape, 8 // part
    vectors = inputs // (LANES * phases)
    each = vectors // blocks  # vectors of one scale
    most = min(VECTORS, TERMS // phases, vectors)
    fit = lambda n: not vectors % n and (not n % each or not each % n)  # noqa: E731
    count = next(n for n in range(most, 0, -1) if fit(n))
    passes, own = vectors // count, min(count, each)
    scales = jnp.repeat(scale, each // own, axis=1)
    scales = scales.reshape(outputs, 1, passes, -1, 1)
    stored = plane.reshape(outputs, 1, passes, count, LANES)
    x = x.reshape(rows, passes, count, LANES, phases).swapaxes(0, 1)
    # A loop stores the transposed x; otherwise each use would gather it.
    x = lax.map(lambda a: a.transpose(1, 3, 0, 2), x).transpose(1, 2, 3, 0, 4)
    total = jnp.float32(0)
    for first in range(0, count, own):
        sums = [jnp.float32(0)] * 4  # chains: an addition waits for the one before it
        for i, (vector, phase) in enumerate(np.ndindex(own, phases)):
            codes = stored[:, :, :, first + vector] >> jnp.uint8(part * phase)
            codes = (codes & jnp.uint8(2**part - 1)).astype(jnp.float32)
            sums[i % 4] += codes * x[first + vector, phase]
        total += sum(sums) * scales[:, :, :, first // own]
    # A product: XLA would fuse a sum into the loop, which is then not vectorized.
    ones = jnp.ones(passes * LANES, jnp.float32)
    return (total.reshape(outputs, rows, -1) @ ones).T


def _by_outputs(x, plane, scale, zero, *, bits, block, middle) -> Array:
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


def _by_inputs(x, plane, scale, zero, *, bits, block, middle) -> Array:
    """y += scale_b (x_b codes_b^T - zero_b sum(x_b)) for each block of inputs b."""
    rows, inputs = x.shape
    blocks = scale.shape[-1]
    size = STEP if blocks == 1 else block
    if inputs % size or size % (8 // bits):
        raise NotImplementedError(f"{inputs} inputs are no whole blocks of {size}")
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
