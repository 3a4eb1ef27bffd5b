"""CPU: plain JAX in the shapes that XLA turns into tight loops. No Pallas here.

XLA's whole-array dequantization writes the dense weight to memory, and its products in
bfloat16 are ten times slower than in float32. Up to four rows (``_by_lanes``) read the
packed bytes once, at the speed of the memory; more multiply slices of the weight, in a
loop over outputs (``_by_outputs``).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.planes import parts, spans
from pallas_kernels.quantized_matmul.reference import check, corrected

LANES = 8  # bytes side by side: one vector of floats
VECTORS, TERMS = 32, 64  # of bytes, and of codes, that one pass adds up at most
LINE = 4  # rows up to which lanes win
# Outputs at a time, the first number that divides them. From 2^19 weights on, XLA makes
# a slice on all cores; many more leave the cache, and each slice packs all rows again.
SLICES = 512, 256, 128, 64, 32, 16, 8
MANY = 256  # rows from which the largest slice is better than the next
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
    check(x, planes, scale, zero, low_rank, bits, block, levels)
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
    return _by_outputs(x, planes, scale, zero, bits=bits, block=block, middle=middle)


def _fits(inputs: int, scale, part: int) -> bool:
    """Whether vectors of bytes of ``part``-bit codes fill whole blocks of inputs."""
    blocks = scale.shape[-1]
    return not inputs % blocks and not inputs // blocks % (LANES * 8 // part)


def _by_lanes(x, planes, scale, zero, *, bits, middle) -> Array:
    """y = sum_b scale_b (x_b codes_b^T - zero_b sum(x_b)); codes: sum of 2^low part."""
    scale = scale.astype(jnp.float32)
    shift = scale * (middle if zero is None else zero.astype(jnp.float32))
    y = -x.reshape(len(x), scale.shape[-1], -1).sum(-1) @ shift.T
    small_first = zip(reversed(planes), reversed(spans(bits)), strict=True)
    for plane, (part, low) in small_first:
        y += 2.0**low * _lanes(x, plane, scale, part)
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


def _by_outputs(x, planes, scale, zero, *, bits, block, middle) -> Array:
    """y of a slice of outputs at a time, from that slice of the weight in float32."""
    (rows, inputs), (outputs, blocks) = x.shape, scale.shape
    span = 8 // min(parts(bits))  # inputs whose codes are whole bytes of every plane
    sizes = SLICES if rows >= MANY else SLICES[1:]
    size = next((n for n in sizes if not outputs % n), 0)
    if not rows or not size or inputs % span:
        raise NotImplementedError(
            f"{rows} rows, {inputs} inputs, {outputs} outputs: accepted are at least "
            f"one row and multiples of {span} and {SLICES[-1]}"
        )
    if blocks > 1 and (inputs % block or block % span):
        raise NotImplementedError(f"{inputs} inputs are no whole blocks of {block}")
    ordered = tuple(x.reshape(rows, -1, span).transpose(2, 0, 1))

    def step(i, y):
        cut = lambda a: lax.dynamic_slice_in_dim(a, i * size, size)  # noqa: E731
        stored, own = [cut(plane) for plane in planes], cut(scale)[..., None]
        shift = middle if zero is None else cut(zero)[..., None].astype(y.dtype)
        total = jnp.float32(0)
        for j, part in enumerate(ordered):
            codes = _digits(stored, bits, j, span).reshape(size, blocks, -1)
            w = (codes - shift) * own.astype(y.dtype)
            total += part @ w.reshape(size, -1).T
        return lax.dynamic_update_slice(y, total, (0, i * size))

    empty = jnp.zeros((rows, outputs), jnp.float32)
    return lax.fori_loop(0, outputs // size, step, empty)


def _digits(planes, bits: int, j: int, span: int) -> Array:
    """Code ``j`` of every ``span`` of them, [out, in / span] in float32."""
    total = jnp.float32(0)
    for plane, (part, low) in zip(planes, spans(bits), strict=True):
        byte, place = divmod(j * part, 8)
        here = plane.reshape(len(plane), -1, span * part // 8)[..., byte]
        digit = (here >> jnp.uint8(place)) & jnp.uint8(2**part - 1)
        total += 2.0**low * digit.astype(jnp.float32)
    return total
