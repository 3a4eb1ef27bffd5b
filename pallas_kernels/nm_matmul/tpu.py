"""TPU: no sparse units; tiles are read compressed and expanded in VMEM.

Lanes hold groups of m inputs: place c of every group meets x[:, c::m]. The values
and mask bytes of a group lie in other lanes; products with 0/1 matrices, which the
matrix unit has time for at decode, carry them over exactly.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import NT, dot, ones_where
from pallas_kernels.nm_matmul.reference import check

LANES = 128
CHUNK = 2 * LANES  # groups expanded at once: whole lanes of mask bytes for m = 4, 8


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Outputs in a tile; all inputs of a row belong to it."""

    outputs: int = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the kernel knows when it is traced."""

    n: int
    m: int
    bits: int | None
    block: int | None
    corrected: bool

    @property
    def per_byte(self) -> int:
        """Values in one element of the stored array."""
        return 1 if self.bits is None else 8 // self.bits


def nm_matmul(
    x,
    mask,
    values,
    scale=None,
    zero=None,
    low_rank=None,
    *,
    n: int,
    m: int,
    bits: int | None = None,
    block: int | None = None,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.nm_matmul`` for m of 4 or 8 and at most 256 rows."""
    check(x, mask, values, scale, zero, low_rank, n, m, bits, block)
    layout = Layout(n, m, bits, block, low_rank is not None)
    lead, inputs = x.shape[:-1], x.shape[-1]
    x2 = x.reshape(-1, inputs)
    if reason := _refusal(layout, len(x2), inputs):
        raise NotImplementedError(reason)
    stored = values if bits is None else values[0]
    rows = -(-len(x2) // 16) * 16
    places = x2.reshape(-1, inputs // m, m).transpose(2, 0, 1)
    places = jnp.pad(places, ((0, 0), (0, rows - len(x2)), (0, 0)))
    tile = (tuning or Tuning()).outputs
    outputs = len(mask)
    weights = [a for a in (mask, stored, scale, zero) if a is not None]
    term, term_specs = (), ()
    if low_rank is not None:
        left, right = (a.astype(x.dtype) for a in low_rank)
        inner = jnp.pad(jnp.dot(x2, left), ((0, rows - len(x2)), (0, 0)))
        term, narrow = (inner, right), inner.shape[1]
        term_specs = (
            pl.BlockSpec((rows, narrow), lambda j: (0, 0)),
            pl.BlockSpec((narrow, tile), lambda j: (0, j)),
        )
    y = pl.pallas_call(
        functools.partial(_kernel, layout=layout),
        grid=(pl.cdiv(outputs, tile),),
        in_specs=[
            pl.BlockSpec(places.shape, lambda j: (0, 0, 0)),
            *(pl.BlockSpec((tile, a.shape[1]), lambda j: (j, 0)) for a in weights),
            *term_specs,
        ],
        out_specs=pl.BlockSpec((rows, tile), lambda j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="nm_matmul",
    )(places, *weights, *term)
    return y[: len(x2)].reshape(*lead, outputs)


def _refusal(layout: Layout, rows: int, inputs: int) -> str | None:
    if layout.m not in (4, 8):
        return f"groups of {layout.m}; this kernel has m = 4 and 8"
    if inputs % (layout.m * LANES // 2):
        return f"{inputs} inputs are not whole lanes of groups of {layout.m}"
    if rows > 256:
        return f"{rows} rows: expanding tiles pays at decode, up to 256"
    if layout.bits not in (None, 4):
        return f"values of {layout.bits} bits; this kernel has 4, and floats"
    if layout.bits and layout.n % 2:
        return f"{layout.n} four-bit values of a group share bytes with the next"
    if layout.block is not None and layout.block % layout.m:
        return f"blocks of {layout.block} cut groups of {layout.m}"
    return None


def _kernel(x_ref, mask_ref, values_ref, *rest, layout: Layout):
    """All inputs of a tile of outputs, a chunk of groups after the other."""
    *grid, y_ref = rest  # scale and zero point, or none
    grid, term = (grid[:-2], grid[-2:]) if layout.corrected else (grid, ())
    groups = x_ref.shape[2]
    total = jnp.zeros(y_ref.shape, jnp.float32)
    for start in range(0, groups, CHUNK):
        here = (start, min(CHUNK, groups - start))
        bits = _group_bits(mask_ref, here, layout.m)
        values = _group_values(values_ref, here, layout)
        scale, zero = (_per_group(ref, here, layout) for ref in (*grid, None, None)[:2])
        if layout.bits:
            values = [v - (8.0 if zero is None else zero) for v in values]
        for place, w in enumerate(_expand(bits, values, layout.m)):
            w = w if scale is None else w * scale
            x = x_ref[place, :, pl.ds(*here)]
            total += dot(x, w.astype(x.dtype), NT)
    if term:
        total += dot(term[0][...], term[1][...])
    y_ref[...] = total.astype(y_ref.dtype)


def _expand(bits, values, m: int):
    """The dense weight at each place of the groups: the next value where a bit is.

    Since n bits of m are set, few counts of bits before a place leave room for its own.
    """
    n, before = len(values), 0
    for place in range(m):
        flag = (bits & (1 << place)) != 0
        first, last = max(0, n - m + place), min(place, n - 1)
        w = values[last]
        for j in range(first, last):
            w = jnp.where(before == j, values[j], w)
        yield jnp.where(flag, w, 0.0)
        before += flag.astype(jnp.int32)


def _group_bits(mask_ref, here, m: int):
    """Each group's m bits in its lane, int32 [outputs, groups]."""
    start, count = here
    if m == 8:
        return mask_ref[:, pl.ds(start, count)].astype(jnp.int32)
    pairs = mask_ref[:, pl.ds(start // 2, count // 2)].astype(jnp.int32)
    both = _carry(pairs.astype(jnp.bfloat16), count, lambda g: g // 2)
    odd = lax.broadcasted_iota(jnp.int32, both.shape, 1) % 2
    return (both.astype(jnp.int32) >> (4 * odd)) & 15


def _group_values(values_ref, here, layout: Layout):
    """The n values of each group in its lane, each float32 [outputs, groups]."""
    start, count = here
    stride = layout.n // layout.per_byte
    carried = [[] for _ in range(stride)]
    for first in range(0, count, LANES):  # one matrix of 0 and 1 serves all
        lanes = min(LANES, count - first)
        at = pl.ds((start + first) * stride, lanes * stride)
        stored = values_ref[:, at]
        if layout.bits:
            stored = stored.astype(jnp.int32).astype(jnp.bfloat16)
        for s, parts in enumerate(carried):
            parts.append(_carry(stored, lanes, lambda g, s=s: g * stride + s))
    carried = [jnp.concatenate(parts, 1) for parts in carried]
    if not layout.bits:
        return carried
    codes = [byte.astype(jnp.int32) for byte in carried]
    halves = [h for byte in codes for h in (byte & 15, byte >> 4)]
    return [h.astype(jnp.float32) for h in halves]


def _per_group(ref, here, layout: Layout):
    """The scale or zero point of each group's block, float32 [outputs, groups or 1]."""
    if ref is None:
        return None
    per_block = ref[...]
    if jnp.issubdtype(per_block.dtype, jnp.integer):
        per_block = per_block.astype(jnp.int32).astype(jnp.bfloat16)
    if layout.block is None:
        return per_block.astype(jnp.float32)
    start, count = here
    return _carry(per_block, count, lambda g: (g + start) * layout.m // layout.block)


def _carry(a, count: int, source):
    """a[:, source(g)] for the lanes g < count, exact, in float32."""
    shape = (a.shape[1], count)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    chosen = lax.broadcasted_iota(jnp.int32, shape, 0) == source(lane)
    return dot(a, ones_where(chosen, a.dtype))
