"""Makers of number formats, and their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import NormalDist

import ml_dtypes
import numpy as np

from jaxllm.core.formats.base import Choice, Format, Integer, Levels


def float_format(exponent: int, mantissa: int) -> Levels:
    """E{exponent}M{mantissa} with subnormals; E4M3 and E5M2 without inf and nan."""
    known = {(4, 3): ml_dtypes.float8_e4m3fn, (5, 2): ml_dtypes.float8_e5m2}
    if (exponent, mantissa) in known:
        dtype = known[exponent, mantissa]
        values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
        values = np.unique(values[np.isfinite(values)])
    else:
        bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
        e, f = np.meshgrid(np.arange(2**exponent), np.arange(steps), indexing="ij")
        normal = (1 + f / steps) * 2.0 ** (e - bias)
        half = np.where(e == 0, f / steps * 2.0 ** (1 - bias), normal).ravel()
        values = np.unique(np.concatenate((-half, half)))
    return Levels(f"e{exponent}m{mantissa}", tuple(map(float, values)))


def normal_float(bits: int) -> Levels:
    """NormalFloat (QLoRA, arXiv:2305.14314, section 3): normal quantiles, exact zero.

    2^(bits-1) quantiles for the negative half, one more for the positive, sharing
    zero, scaled to [-1, 1]; the tail offset is that of the paper's code for any bits:
    the mean of 1 - 1/(2 2^b - 2) and 1 - 1/(2 2^b).
    """
    _check_bits(bits, 2)
    count = 2 ** (bits - 1)
    tail = 1 - (1 / (4 * count - 2) + 1 / (4 * count)) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(tail, 0.5, count + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(tail, 0.5, count)[:-1]]
    values = np.sort(np.array([*negative, 0.0, *positive]))
    return Levels(f"nf{bits}", tuple(map(float, values / np.abs(values).max())))


def ternary() -> Levels:
    """-1, 0 and 1."""
    return Levels("ternary", (-1.0, 0.0, 1.0))


def bipolar(bits: int) -> Levels:
    """Odd integers: sums of +-2^i (APT-LLM, arXiv:2409.17870, section 3), no zero."""
    _check_bits(bits, 1)
    top = 2**bits - 1
    return Levels(f"bipolar{bits}", tuple(map(float, range(-top, top + 1, 2))))


def balanced(bits: int) -> Levels:
    """-2^(b-1) .. 2^(b-1): one integer more, so that both signs reach as far.

    The bit balance of ABQ-LLM (arXiv:2408.08554, section 3.3): {-2, -1, 0, 1, 2} for
    two bits. The odd count takes a plane of bits more.
    """
    _check_bits(bits, 1)
    if bits > 7:
        raise ValueError(f"balanced levels of {bits} bits; accepted: 1 to 7")
    top = 2 ** (bits - 1)
    return Levels(f"balanced{bits}", tuple(map(float, range(-top, top + 1))))


def shifts(bits: int) -> Levels:
    """Zero and +-2^-k, k = 0 .. 2^(bits-1) - 2: products with them are shifts."""
    _check_bits(bits, 2)
    half = [2.0**-k for k in range(2 ** (bits - 1) - 1)]
    return Levels(f"pot{bits}", tuple(sorted((*half, 0.0, *(-v for v in half)))))


def power_levels(bits: int, exponent: float) -> Levels:
    """sign(q) |q / q_max|^(1/a): integers where |w|^a is spread evenly, a <= 1."""
    _check_bits(bits, 2)
    if not 0 < exponent <= 1:
        raise ValueError(f"exponent {exponent}; accepted: 0 < exponent <= 1")
    q = np.arange(2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
    half = q ** (1 / exponent)
    values = np.concatenate((-half[:0:-1], half))
    return Levels(f"power{bits}^{exponent:g}", tuple(map(float, values)))


def powers(bits: int, exponents: tuple[float, ...]) -> Choice:
    """One of several power exponents per block (see ``power_levels``)."""
    tables = tuple(power_levels(bits, a) for a in exponents)
    return Choice(f"powers{bits}", tables)


def searched_float(bits: int) -> Choice:
    """Any split of the bits into exponent (at least one) and mantissa, per block."""
    _check_bits(bits, 3)
    tables = tuple(float_format(e, bits - 1 - e) for e in range(1, bits))
    return Choice(f"float{bits}", tables)


def extended_float(bits: int) -> Choice:
    """FP3 or FP4 whose second zero becomes a value of the block's choice (BitMoD).

    One of +-3 and +-6 beside +-{0, 1, 2, 4}, one of +-5 and +-8 beside
    +-{0, .5, 1, 1.5, 2, 3, 4, 6} (arXiv:2411.11745, section 3.1).
    """
    if bits not in (3, 4):
        raise ValueError(f"extended floats of {bits!r} bits; accepted: 3, 4")
    plain = float_format(2, bits - 3).levels
    extra = (3.0, 6.0) if bits == 3 else (5.0, 8.0)
    tables = tuple(
        Levels(f"fp{bits}{v:+g}", tuple(sorted((*plain, v))))
        for value in extra
        for v in (value, -value)
    )
    return Choice(f"xfp{bits}", tables)


def _check_bits(bits, least: int) -> None:
    if not isinstance(bits, int) or not least <= bits <= 8:
        raise ValueError(f"levels of {bits!r} bits; accepted: {least} to 8")


_NUMBERED: dict[str, Callable[[int], Format]] = dict(
    int=Integer,
    nf=normal_float,
    bipolar=bipolar,
    balanced=balanced,
    pot=shifts,
    xfp=extended_float,
)
_NAMED = dict(fp8="e4m3", fp4="e2m1", fp6="e3m2", fp3="e2m0")


def parse_format(name: str | Format) -> Format:
    """``int4``, ``sint8`` (symmetric), ``nf4``, ``e2m1``, ``ternary`` ... by name."""
    if not isinstance(name, str):
        return name
    alias = _NAMED.get(name, name)
    if alias == "ternary":
        return ternary()
    if alias[:4] == "sint" and alias[4:].isdigit():
        return Integer(int(alias[4:]), symmetric=True)
    if found := re.fullmatch(r"e(\d)m(\d)", alias):
        return float_format(int(found[1]), int(found[2]))
    found = re.fullmatch(r"([a-z]+)(\d+)", alias)
    if found and found[1] in _NUMBERED:
        return _NUMBERED[found[1]](int(found[2]))
    accepted = (
        "int1..8, sint1..8, nf2..8, eXmY, fp3, fp4, fp6, fp8, ternary, bipolar1..8"
    )
    raise ValueError(
        f"number format {name!r}; accepted: {accepted}, balanced1..7, pot2..8, xfp3, "
        "xfp4"
    )
