"""E8, the densest lattice of eight dimensions, as codebooks of 16 and of 8 bits.

E8P (QuIP#, arXiv:2402.04396, section 4.2) has 2^16 points of E8 + 1/4 and a table of
256 rows: a code is a pattern of magnitudes (8 bits), the signs of all coordinates but
the first (7 bits), whose sign follows from parity, and a shift by +1/4 or -1/4.
"""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt16

LENGTH = 8  # numbers that one code stands for


@functools.cache
def patterns() -> np.ndarray:
    """The 256 magnitudes of E8P, [256, 8]: those of D8 + 1/2 of least norm.

    All 227 of squared norm up to 10, and of norm 12 the first 29 in lexicographic
    order that are made of 1/2 and 3/2 (the authors' table has another 29 of these).
    """
    rows = np.array([*itertools.product((0.5, 1.5, 2.5), repeat=LENGTH)], np.float32)
    norm = (rows**2).sum(1)
    outer = rows[(norm == 12) & (rows.max(1) < 2)]
    return np.concatenate((rows[norm <= 10], outer[:29]))


def _odd() -> np.ndarray:
    """Whether a pattern needs an odd number of minus signs for an even sum, [256]."""
    return patterns().sum(1) % 2 == 1


@functools.cache
def shortest() -> np.ndarray:
    """256 points of E8, [256, 8]: zero, all 240 of norm 2, and 15 of norm 4."""
    whole = np.array([*itertools.product((-1, 0, 1), repeat=LENGTH)], np.float32)
    half = np.array([*itertools.product((-0.5, 0.5), repeat=LENGTH)], np.float32)
    half = half[half.sum(1) % 2 == 0]
    whole = whole[(whole**2).sum(1) == 2]
    axes = 2 * np.concatenate((np.eye(LENGTH), -np.eye(LENGTH)))[:15]
    found = np.concatenate((np.zeros((1, LENGTH)), whole, half, axes))
    return found.astype(np.float32)


def points(codes: UInt16[Array, "*n"] | UInt8[Array, "*n"]) -> Float[Array, "*n 8"]:
    """What codes stand for: E8P for codes of 16 bits, short points of E8 for 8."""
    if codes.dtype == jnp.uint8:
        return jnp.asarray(shortest())[codes]
    codes = codes.astype(jnp.int32)
    pattern, shift = codes >> 8, (codes & 1).astype(jnp.float32)
    places = jnp.expand_dims(jnp.arange(1, LENGTH), tuple(range(codes.ndim)))
    minus = (codes[..., None] >> places) & 1
    first = (minus.sum(-1) + jnp.asarray(_odd(), jnp.int32)[pattern]) & 1
    minus = jnp.concatenate((first[..., None], minus), -1)
    signed = jnp.asarray(patterns())[pattern] * (1 - 2 * minus).astype(jnp.float32)
    return signed + (shift[..., None] - 0.5) / 2


def nearest_code(
    x: Float[Array, "n 8"], bits: int = 16
) -> UInt16[Array, "n"] | UInt8[Array, "n"]:
    """The code of the nearest point, exactly, without looking at 2^16 of them.

    For each shift and pattern the best signs are those of x; where their parity is
    wrong, the coordinate with the least |x_i| s_i is turned.
    """
    if bits == 8:
        table = jnp.asarray(shortest())
        far = jnp.expand_dims((table**2).sum(1), 0) - 2 * x @ table.T
        return far.argmin(1).astype(jnp.uint8)
    found = [_with_shift(x, shift) for shift in (0, 1)]
    (low, low_code), (high, high_code) = found
    return jnp.where(high < low, high_code, low_code).astype(jnp.uint16)


def _with_shift(x, shift: int):
    """(squared distance, code) of the best point with one shift."""
    table, odd = jnp.asarray(patterns()), jnp.asarray(_odd(), jnp.int32)
    x = x - (shift - 0.5) / 2
    size, minus = jnp.abs(x), (x < 0).astype(jnp.int32)
    wrong = (minus.sum(1)[:, None] & 1) != jnp.expand_dims(odd, 0)
    turned = (size[:, None] * table[None]).min(2)
    norm = jnp.expand_dims((table**2).sum(1), 0)
    far = norm - 2 * size @ table.T + 4 * jnp.where(wrong, turned, 0.0)
    best = far.argmin(1)
    pick = lambda a: jnp.take_along_axis(a, best[:, None], 1)[:, 0]  # noqa: E731
    turn = (size * table[best]).argmin(1)[:, None] == jnp.arange(LENGTH)[None]
    minus = minus ^ (turn & pick(wrong)[:, None]).astype(jnp.int32)
    places = jnp.arange(1, LENGTH)
    signs = (minus[:, 1:] << jnp.expand_dims(places, 0)).sum(1)
    return pick(far) + (x**2).sum(1), (best << 8) | signs | shift
