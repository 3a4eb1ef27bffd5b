"""Codes of 1 to 8 bits packed along the last axis into planes of bytes.

A b-bit code is split into power-of-two parts (3 = 2 + 1, 6 = 4 + 2, ...), each a
plane whose bytes hold 8 / part codes, the first in the lowest bits. Planes can be
cut along either axis, so they shard, and a kernel reads each without shuffling.
``block`` inputs of an output share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels.annotations import Array, UInt8

Planes = tuple[UInt8[Array, "out _"], ...]  # of a matrix, inputs in the minor axis


def parts(bits: int) -> tuple[int, ...]:
    """The plane widths of a code, largest first: 3 -> (2, 1)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits; accepted: 1 to 8")
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def spans(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, lowest bit of the code) of each plane: 3 -> ((2, 1), (1, 0))."""
    return tuple((part, bits & (part - 1)) for part in parts(bits))


def pack(
    codes: UInt8[Array, "*lead n"], bits: int
) -> tuple[UInt8[Array, "*lead _"], ...]:
    """Planes of ``codes`` < 2^bits; a short last byte is filled with zeros."""
    planes = []
    for part, low in spans(bits):
        piece = (codes >> low) & (2**part - 1)
        short = -codes.shape[-1] % (8 // part)
        piece = jnp.pad(piece, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
        count = piece.shape[-1] * part // 8
        grouped = piece.reshape(*codes.shape[:-1], count, 8 // part)
        shifted = grouped << _starts(part, grouped.ndim)
        planes.append(shifted.sum(-1, dtype=jnp.uint8))
    return tuple(planes)


def unpack(
    planes: Sequence[UInt8[Array, "*lead _"]], bits: int, count: int
) -> UInt8[Array, "*lead count"]:
    """The first ``count`` codes of each row (inverse of ``pack``)."""
    total = jnp.uint8(0)
    for plane, (part, low) in zip(planes, spans(bits), strict=True):
        piece = plane[..., None] >> _starts(part, plane.ndim + 1)
        piece = piece & jnp.uint8(2**part - 1)
        piece = piece.reshape(*plane.shape[:-1], plane.shape[-1] * 8 // part)
        total = total | (piece[..., :count] << jnp.uint8(low))
    return total


def check_planes(planes, inputs: int, bits: int) -> int:
    """The number of outputs; ValueError where planes do not hold such codes."""
    outputs = len(planes[0])
    check_bytes(planes, [(outputs, -(-inputs * part // 8)) for part in parts(bits)])
    return outputs


def check_bytes(planes, shapes: Sequence[tuple[int, ...]]) -> None:
    """ValueError where planes are not bytes of these shapes."""
    found = [f"{plane.dtype}{list(plane.shape)}" for plane in planes]
    wanted = [f"uint8{list(shape)}" for shape in shapes]
    if found != wanted:
        raise ValueError(f"planes {', '.join(found)}; accepted: {', '.join(wanted)}")


def block_count(inputs: int, block: int | None) -> int:
    """Blocks of ``block`` inputs (None: all), the last of which may be short."""
    if block is not None and block < 1:
        raise ValueError(f"blocks of {block} inputs; accepted: at least 1")
    return 1 if block is None else -(-inputs // block)


def check_blocks(outputs: int, inputs: int, block: int | None, **arrays) -> None:
    """ValueError names what has not one value for each output and block of inputs."""
    shape = outputs, block_count(inputs, block)
    for name, a in arrays.items():
        if a is not None and a.shape != shape:
            raise ValueError(f"{name} {a.shape}; accepted: {shape}")


def _starts(part: int, ndim: int) -> UInt8[Array, "*ones codes"]:
    """Where the codes of one byte begin, along the last of ``ndim`` axes."""
    shifts = jnp.arange(8 // part, dtype=jnp.uint8) * jnp.uint8(part)
    return jnp.expand_dims(shifts, tuple(range(ndim - 1)))
