"""Few entries of a matrix, listed in segments that a kernel reads without searching.

Outputs are cut into stripes of 128 and inputs into windows of 256. A segment holds up
to 128 entries of one stripe and window, ordered by output, so that the entries of an
output are a run: its sum is a difference of two prefix sums (segmented sums: Blelloch,
Heroux and Zagha 1993, CMU-CS-93-173). Eight segments of one stripe are a group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Bool, Float, UInt8, UInt16

STRIPE = 128  # outputs
WINDOW = 256  # inputs: a place in it is a byte
SLOTS = 128  # entries of a segment
GROUP = 8  # segments


class Segments(NamedTuple):
    """``place`` (in the window) and ``value`` of each slot; ``end`` of each output.

    ``end[s, o]`` counts the entries of segment s that belong to outputs up to o of its
    stripe; it is zero in a segment without entries. Groups are in the order of their
    stripes, each of which has one at least; what is left belongs to the stripe after
    the last.
    """

    stripe: UInt16[Array, "*lead groups"]
    window: UInt16[Array, "*lead segments"]
    place: UInt8[Array, "*lead segments slots"]
    end: UInt8[Array, "*lead segments outputs"]
    value: Float[Array, "*lead segments slots"]


def room(shape: tuple[int, int], count: int) -> int:
    """Groups that hold any ``count`` entries of an [in, out] matrix.

    Every stripe and window may leave a segment with free slots, every stripe a group
    with free segments.
    """
    windows, stripes = -(-shape[0] // WINDOW), -(-shape[1] // STRIPE)
    segments = (count + (SLOTS - 1) * min(count, windows * stripes)) // SLOTS
    return segments // GROUP + stripes


def size(shape: tuple[int, int], count: int, itemsize: int) -> int:
    """Bytes of those groups, with values of ``itemsize`` bytes."""
    segment = SLOTS * (1 + itemsize) + STRIPE + 2
    return room(shape, count) * (GROUP * segment + 2)


def pack(
    dense: Float[Array, "in out"], chosen: Bool[Array, "in out"], count: int
) -> Segments:
    """The ``chosen`` entries of ``dense``, of which there are at most ``count``."""
    stripes, windows = -(-dense.shape[1] // STRIPE), -(-dense.shape[0] // WINDOW)

    def ordered(a):
        """By stripe, window, output, input."""
        a = jnp.pad(a.T, ((0, -a.shape[1] % STRIPE), (0, -a.shape[0] % WINDOW)))
        return a.reshape(stripes, STRIPE, windows, WINDOW).swapaxes(1, 2)

    flags = ordered(chosen)
    held = flags.sum((2, 3))
    segments = -(-held // SLOTS)
    groups = jnp.maximum(1, -(-segments.sum(1) // GROUP))
    first = GROUP * _before(groups)[:, None] + _before(segments)  # of each bucket
    (at,) = jnp.nonzero(flags.ravel(), size=count, fill_value=flags.size)
    bucket, inside = at // (STRIPE * WINDOW), at % (STRIPE * WINDOW)
    rank = jnp.arange(count) - _before(held.ravel()).at[bucket].get(mode="clip")
    number = room(dense.shape, count)
    row = first.ravel().at[bucket].get(mode="clip") + rank // SLOTS
    row = jnp.where(at < flags.size, row, number * GROUP)  # dropped where it is set
    slot = row, rank % SLOTS
    blank = jnp.zeros((number * GROUP, SLOTS), jnp.uint8)
    runs = jnp.zeros((number * GROUP, STRIPE), int).at[row, inside // WINDOW].add(1)
    stripe = jnp.repeat(
        jnp.arange(stripes + 1), jnp.append(groups, number), total_repeat_length=number
    )
    window = jnp.zeros(number * GROUP, int).at[row].set(bucket % windows)
    value = ordered(dense).ravel().at[at].get(mode="clip")
    return Segments(
        stripe.astype(jnp.uint16),
        window.astype(jnp.uint16),
        blank.at[slot].set((inside % WINDOW).astype(jnp.uint8)),
        jnp.cumsum(runs, 1).astype(jnp.uint8),
        blank.astype(dense.dtype).at[slot].set(value),
    )


def _before(counts):
    """The sum of those before, along the last axis."""
    return jnp.cumsum(counts, -1) - counts


def unpack(segments: Segments, shape: tuple[int, int]) -> Float[Array, "*lead in out"]:
    """The dense matrix [in, out]; inverse of ``pack``."""
    if segments.stripe.ndim > 1:
        return jax.vmap(lambda s: unpack(s, shape))(segments)
    count = functools.partial(jnp.searchsorted, v=jnp.arange(SLOTS), side="right")
    run = jax.vmap(count)(segments.end.astype(int))  # the output of each slot
    stripe = jnp.repeat(segments.stripe.astype(int), GROUP)[:, None]
    window = segments.window.astype(int)[:, None]
    target = jnp.where(run < STRIPE, stripe * STRIPE + run, shape[1])  # free: dropped
    blank = jnp.zeros(shape, segments.value.dtype)
    source = window * WINDOW + segments.place.astype(int)
    return blank.at[source, target].add(segments.value)
