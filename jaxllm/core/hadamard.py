"""Hadamard matrices by construction, and the transform along the last axis.

Orders 2^k (Sylvester), q + 1 and 2 (q + 1) (Paley I and II, q a prime), 172 and
others of Williamson type, and products of these. Where no matrix of an order is
known here, a block-diagonal one of the largest dividing order is used.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np


@functools.cache
def hadamard(order: int) -> np.ndarray | None:
    """A matrix of +1 and -1 with H HT = n I, or None where none is known here."""
    if order in (1, 2):
        return np.array([[1, 1], [1, -1]], np.int8)[:order, :order]
    if order % 4:
        return None
    for make in (_paley_one, _paley_two, _williamson):
        if (found := make(order)) is not None:
            return found
    for factor in (2, 4, 12, 20, 28):
        if order % factor == 0 and order > factor:
            small, rest = hadamard(factor), hadamard(order // factor)
            if small is not None and rest is not None:
                return np.kron(small, rest)
    return None


def largest_order(width: int) -> int:
    """The largest divisor of ``width`` for which a Hadamard matrix is known here."""
    divisors = (d for d in range(width, 0, -1) if width % d == 0)
    return next(d for d in divisors if hadamard(d) is not None)


@functools.cache
def _split(order: int) -> tuple[int, int]:
    """order = dense * 2^k, both Hadamard orders, with the dense part small."""
    power = order & -order
    while power > 1 and hadamard(order // power) is None:
        power //= 2
    return order // power, power


def hadamard_transform(x, *, order: int | None = None):
    """x H / sqrt(order) along the last axis, block-diagonal when it is wider.

    ``order`` defaults to the largest known one that divides the width.
    """
    order = order or largest_order(x.shape[-1])
    if x.shape[-1] % order:
        raise ValueError(f"order {order} does not divide the width {x.shape[-1]}")
    dense, power = _split(order)
    y = x.reshape(*x.shape[:-1], -1, dense, power)
    step = 1
    while step < power:
        pairs = y.reshape(*y.shape[:-1], -1, 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack((a + b, a - b), -2).reshape(y.shape)
        step *= 2
    if dense > 1:
        core = jnp.asarray(hadamard(dense), y.dtype)
        y = jnp.einsum("...dp,de->...ep", y, core)
    return (y * jnp.asarray(order**-0.5, y.dtype)).reshape(x.shape)


def hadamard_matrix(width: int, order: int | None = None) -> np.ndarray:
    """The matrix that ``hadamard_transform`` multiplies by, [width, width]."""
    order = order or largest_order(width)
    dense, power = _split(order)
    block = np.kron(hadamard(dense), _sylvester(power)) / math.sqrt(order)
    return np.kron(np.eye(width // order), block).astype(np.float32)


def _sylvester(order: int) -> np.ndarray:
    h = np.ones((1, 1), np.int8)
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0] + [1 if i in squares else -1 for i in range(1, q)], np.int8)
    index = np.arange(q)
    return chi[(index[:, None] - index[None]) % q]


def _paley_one(order: int) -> np.ndarray | None:
    q = order - 1
    if not _is_prime(q) or q % 4 != 3:
        return None
    s = np.zeros((order, order), np.int8)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
    return s + np.eye(order, dtype=np.int8)


def _paley_two(order: int) -> np.ndarray | None:
    q = order // 2 - 1
    if order % 4 or not _is_prime(q) or q % 4 != 1:
        return None
    c = np.zeros((q + 1, q + 1), np.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(q)
    plus, zero = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(c, plus) + np.kron(np.eye(q + 1), zero)).astype(np.int8)


def _williamson(order: int) -> np.ndarray | None:
    """Four symmetric circulants with A^2 + B^2 + C^2 + D^2 = order I."""
    n = order // 4
    rows = _williamson_rows(n) if n % 2 else None
    if rows is None:
        return None
    index = np.arange(n)
    a, b, c, d = (row[(index[None] - index[:, None]) % n] for row in rows)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


@functools.cache
def _williamson_rows(n: int) -> tuple[np.ndarray, ...] | None:
    """First rows whose power spectra add up to 4 n at every frequency.

    Rows are constant on the orbits of a multiplier group, which leaves few enough
    of them (at most 2^9) to match pairs of spectra in a table (Williamson 1944).
    """
    orbits = _multiplier_orbits(n)
    if orbits is None:
        return None
    signs = np.array([*itertools.product((1, -1), repeat=len(orbits))], np.int8)
    rows = np.ones((len(signs), n), np.int8)
    for i, orbit in enumerate(orbits):
        rows[:, orbit] = signs[:, i, None]
    spectra = np.fft.rfft(rows, axis=1).real ** 2
    one, two = np.triu_indices(len(rows))
    sums = spectra[one] + spectra[two]
    table = {key.tobytes(): i for i, key in enumerate(np.rint(sums * 64).astype(int))}
    wanted = np.rint((4 * n - sums) * 64).astype(int)
    for a in np.flatnonzero((sums <= 4 * n + 1e-6).all(1)):
        if (b := table.get(wanted[a].tobytes())) is not None:
            return rows[one[a]], rows[two[a]], rows[one[b]], rows[two[b]]
    return None


def _multiplier_orbits(n: int) -> list[list[int]] | None:
    """Orbits of 1..n-1 under a group that contains -1, as many as are searchable."""
    for generator in range(1, n):
        if math.gcd(generator, n) > 1:
            continue
        group, value = {1, n - 1}, generator
        while value != 1:
            group |= {value, n - value}
            value = value * generator % n
        orbits = {tuple(sorted({g * i % n for g in group})) for i in range(1, n)}
        if len(orbits) <= 9 and len(group) <= 6:
            return [list(o) for o in sorted(orbits)]
    return None
