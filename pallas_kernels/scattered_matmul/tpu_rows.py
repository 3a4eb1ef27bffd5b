"""TPU: inputs are gathered along lanes, prefix sums are a product with a triangle.

Sublanes hold the segments of a group, for one row of x after the other. The two halves
of a window of bfloat16 share int32 words, so that one gather serves both. The triangle
of ones stays in the matrix unit; products of bfloat16 are exact in two parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mxu import before, ones_where, product_of_terms
from pallas_kernels.scattered_matmul.segments import (
    GROUP,
    SLOTS,
    STRIPE,
    WINDOW,
    Segments,
)

ROWS = 16  # of x in a step
FEWEST = 8  # groups at once; those of four fill a tile of bytes
VMEM = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Groups in a step; those times rows of x whose prefix sums are one product.

    Powers of two, the first of them at least as large as the second.
    """

    groups: int = 128
    batch: int = 64


def multiply(
    x,
    segments: Segments,
    *,
    outputs: int,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.scattered_matmul`` of x [rows, in]."""
    tuning, dtype = tuning or Tuning(), x.dtype
    x = x if dtype == jnp.bfloat16 else x.astype(jnp.float32)
    count, inputs = x.shape
    rows = min(ROWS, count)
    batch = max(FEWEST, tuning.batch // (1 << (rows - 1).bit_length()))
    stripes, windows = pl.cdiv(outputs, STRIPE), pl.cdiv(inputs, WINDOW)
    # Both halves of a window share a word of x in bfloat16.
    halves, word = (1, jnp.int32) if x.dtype == jnp.bfloat16 else (2, jnp.float32)
    words = halves, windows * rows, SLOTS
    sums = stripes + 1, rows, GROUP, STRIPE
    if 4 * (math.prod(words) + math.prod(sums)) > VMEM // 2:
        raise NotImplementedError(f"sums of {outputs} outputs do not fit into VMEM")
    x = jnp.pad(x, ((0, 0), (0, windows * WINDOW - inputs)))
    groups = len(segments.stripe)
    steps = pl.cdiv(groups, tuning.groups)
    short = steps * tuning.groups - groups
    stripe, window = (a.astype(jnp.int32) for a in segments[:2])
    scalars = (
        (stripe < stripes).sum(keepdims=True),
        jnp.pad(stripe, (0, short), constant_values=stripes),
        jnp.pad(window * rows, (0, short * GROUP)),
    )
    listed = pl.BlockSpec((tuning.groups * GROUP, SLOTS), lambda i, j, *_: (j, 0))
    y = pl.pallas_call(
        functools.partial(_kernel, batch=batch, unroll=not interpret),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(count, rows), steps),
            in_specs=[
                pl.BlockSpec((rows, x.shape[1]), lambda i, *_: (i, 0)),
                *[listed] * 3,
            ],
            out_specs=pl.BlockSpec((rows, stripes * STRIPE), lambda i, *_: (i, 0)),
            scratch_shapes=[
                pltpu.VMEM(words, word),
                pltpu.VMEM((halves, batch, rows, GROUP, SLOTS), word),
                pltpu.VMEM((batch, rows, GROUP, SLOTS), jnp.float32),
                pltpu.VMEM(sums, jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((count, stripes * STRIPE), dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="scattered_matmul",
    )(*scalars, x, segments.place, segments.end, segments.value)
    return y[:, :outputs]


def _kernel(
    used_ref,
    stripe_ref,
    window_ref,
    x_ref,
    place_ref,
    end_ref,
    value_ref,
    y_ref,
    words_ref,
    found_ref,
    held_ref,
    sums_ref,
    *,
    batch: int,
    unroll: bool,
):
    """One step: prefix sums of a batch are made while those of the last one are read.

    Sums at the ends of runs are added up in ``sums_ref`` by stripe; what is past the
    used groups has a stripe of its own, which nobody reads.
    """
    step, rows = pl.program_id(1), len(x_ref)
    groups = len(place_ref) // GROUP

    @pl.when(step == 0)
    def _():
        sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)
        _store_words(x_ref, words_ref)

    exact = x_ref.dtype == value_ref.dtype == jnp.bfloat16

    def batch_of(ref, first, dtype):
        """The segments of a batch, for each row of x."""
        start = pl.multiple_of(first * GROUP, batch * GROUP)
        listed = ref[pl.ds(start, batch * GROUP), :].astype(dtype)
        each = (batch, rows, GROUP, SLOTS)
        return jnp.broadcast_to(listed.reshape(batch, 1, *each[2:]), each)

    def gather(first):
        def collect(g, _):
            at = (step * groups + first + g) * GROUP
            sources = [window_ref[at + s] for s in range(GROUP)]
            _collect(words_ref, sources, found_ref, g)

        lax.fori_loop(0, batch, collect, None, unroll=unroll)
        places = batch_of(place_ref, first, jnp.int32)
        values = batch_of(value_ref, first, jnp.float32)
        found = [found_ref[half].reshape(-1, SLOTS) for half in range(len(words_ref))]
        x = _gathered(found, places.reshape(-1, SLOTS))
        products = x * values.reshape(-1, SLOTS)
        sums = _prefix_sums(products, 2 if exact else 3)
        held_ref[...] = sums.reshape(held_ref.shape)

    def add(first):
        ends = batch_of(end_ref, first, jnp.int32).reshape(-1, SLOTS)
        sums = _at_ends(held_ref[...].reshape(-1, SLOTS), ends)
        sums = sums.reshape(held_ref.shape)
        for g in range(batch):
            sums_ref[stripe_ref[step * groups + first + g]] += sums[g]

    here = jnp.clip(used_ref[0] - step * groups, 0, groups)

    @pl.when(here > 0)
    def _():
        last = (here - 1) // batch
        gather(0)

        @pl.loop(0, last)
        def _(i):
            add(i * batch)
            gather((i + 1) * batch)

        add(last * batch)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        _finish(sums_ref, y_ref)


def _store_words(x_ref, words_ref):
    """Both halves of a window of bfloat16 in one word, the first below; or float32."""
    rows = len(x_ref)
    for window in range(words_ref.shape[1] // rows):
        here = pl.ds(window * rows, rows)
        cuts = (pl.ds(window * WINDOW + half, SLOTS) for half in (0, SLOTS))
        low, high = (x_ref[:, cut].astype(jnp.float32) for cut in cuts)
        if len(words_ref) == 2:
            words_ref[0, here], words_ref[1, here] = low, high
        else:
            low, high = (pltpu.bitcast(a, jnp.int32) for a in (low, high))
            words_ref[0, here] = high | lax.shift_right_logical(low, 16)


def _collect(words_ref, sources: list, found_ref, group):
    """The windows of a group's segments, for each row of x."""
    for row in range(found_ref.shape[2]):
        own = [source + row for source in sources]
        for half in range(len(words_ref)):
            found_ref[half, group, row] = _rows_of(words_ref.at[half], own)


def _rows_of(ref, sources: list):
    """These rows of ``ref``, one below the other."""
    shape = len(sources), ref.shape[1]
    place = lax.broadcasted_iota(jnp.int32, shape, 0)
    rows = [jnp.broadcast_to(ref[pl.ds(s, 1), :], shape) for s in sources]
    return functools.reduce(
        lambda above, i: jnp.where(place < i, above, rows[i]),
        range(1, len(rows)),
        rows[0],
    )


def _gathered(windows: list, place):
    """x at a place of each segment's window, float32 [segments, slots]."""
    lane, second = place & (SLOTS - 1), place >= SLOTS
    halves = [jnp.take_along_axis(a, lane, 1) for a in windows]
    if len(halves) == 2:
        return jnp.where(second, halves[1], halves[0])
    (word,) = halves
    bits = jnp.where(second, word & -65536, word << 16)
    return pltpu.bitcast(bits, jnp.float32)


def _prefix_sums(products, count: int):
    """Along the slots, of products in ``count`` terms."""
    slot = functools.partial(lax.broadcasted_iota, jnp.int32, (SLOTS, SLOTS))
    triangle = ones_where(slot(0) <= slot(1), jnp.bfloat16)
    return product_of_terms(products, triangle, count=count)


def _at_ends(sums, ends):
    """The prefix sum of all entries up to each output, nothing where there are none."""
    whole = jnp.take_along_axis(sums, jnp.maximum(ends - 1, 0), 1)
    return jnp.where(ends > 0, whole, 0.0)


def _finish(sums_ref, y_ref):
    """What an output's own entries add to the sums of the one before."""

    @pl.loop(0, len(sums_ref) - 1)
    def _(stripe):
        outputs = pl.ds(pl.multiple_of(stripe * STRIPE, STRIPE), STRIPE)
        sums = sums_ref[stripe].sum(1)
        y_ref[:, outputs] = (sums - before(sums)).astype(y_ref.dtype)
