"""Codes of 1 to 8 bits packed along the last axis into planes of bytes.

A b-bit code is split into power-of-two parts (3 = 2 + 1, 6 = 4 + 2, ...), each a
plane whose bytes hold 8 / part codes, the first in the lowest bits. Planes can be
cut along either axis, so they shard, and a kernel reads each without shuffling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def parts(bits: int) -> tuple[int, ...]:
    """The plane widths of a code, largest first: 3 -> (2, 1)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits; accepted: 1 to 8")
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def ascending(planes: Sequence[Array], bits: int) -> Iterator[tuple[Array, int, int]]:
    """(plane, bits of its part of a code, the lowest of them), low planes first."""
    low = 0
    for plane, part in zip(reversed(planes), reversed(parts(bits)), strict=True):
        yield plane, part, low
        low += part


def starts(part: int, ndim: int) -> UInt8[Array, "*ones codes"]:
    """Where the codes of one byte begin, along the last of ``ndim`` axes."""
    shifts = jnp.arange(8 // part, dtype=jnp.uint8) * jnp.uint8(part)
    return jnp.expand_dims(shifts, tuple(range(ndim - 1)))


def unpack(
    planes: Sequence[UInt8[Array, "*lead _"]], bits: int, count: int
) -> UInt8[Array, "*lead count"]:
    """The first ``count`` codes of each row."""
    total = jnp.uint8(0)
    for plane, part, low in ascending(planes, bits):
        piece = plane[..., None] >> starts(part, plane.ndim + 1)
        piece = (piece & jnp.uint8(2**part - 1)).reshape(*plane.shape[:-1], -1)
        total = total | (piece[..., :count] << jnp.uint8(low))
    return total
