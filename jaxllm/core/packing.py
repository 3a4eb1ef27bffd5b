"""Codes of 1 to 8 bits into planes of bytes and back; trits five to a byte."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jaxllm.core.arrays import to_rank
from pallas_kernels.planes import pack, parts, unpack

__all__ = [
    "Planes",
    "pack",
    "pack_trits",
    "packed_bytes",
    "parts",
    "unpack",
    "unpack_trits",
]

Planes = tuple[UInt8[Array, "... _"], ...]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one packed row."""
    return int(sum(np.ceil(count * p / 8) for p in parts(bits)))


TRITS = 5  # 3^5 = 243 combinations fit a byte


def pack_trits(codes: UInt8[Array, "... n"]) -> UInt8[Array, "... _"]:
    """Codes 0 to 2, five to a byte, the first of least weight; filled with zeros."""
    short = -codes.shape[-1] % TRITS
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    grouped = padded.reshape(*codes.shape[:-1], -1, TRITS)
    powers = to_rank(_trit_weights(), grouped.ndim)
    return (grouped * powers).sum(-1, dtype=jnp.uint8)


def unpack_trits(packed: UInt8[Array, "... _"], count: int) -> UInt8[Array, "... n"]:
    """The first ``count`` codes of each row (inverse of ``pack_trits``)."""
    powers = to_rank(_trit_weights(), packed.ndim + 1)
    codes = (packed[..., None] // powers) % jnp.uint8(3)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def _trit_weights() -> UInt8[Array, "trits"]:
    return jnp.asarray(3 ** np.arange(TRITS), jnp.uint8)
