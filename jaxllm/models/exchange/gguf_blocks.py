"""ggml's block types as weight types: rows of bytes [out, bytes], blocks along in.

Q4_0 and Q8_0 are symmetric groups of 32 with a float16 scale: value = d (q - 8) and
d q. Q6_K is groups of 16 with int8 scales in float16 units of 256 inputs. Q4_K is
value = d sc q - dmin m with 6-bit sc and m per 32 inputs and float16 d and dmin per
256: unsigned codes minus a constant per block.
"""

from __future__ import annotations

import abc

import jax.numpy as jnp
import numpy as np

from jaxllm.core.formats import Integer, Levels
from jaxllm.core.packing import pack
from jaxllm.core.weights import Quantized, Sum, Weight
from jaxllm.core.weights.blockwise import Blockwise
from jaxllm.models.exchange.affine import (
    Affine,
    Scheme,
    Stored,
    exact,
    narrowed,
    scheme_of,
    weight,
)
from jaxllm.models.exchange.gguf_file import Kind

SUPER = 256  # inputs of a super-block
UINT4 = Levels("uint4", tuple(map(float, range(16))))
UINT6 = Levels("uint6", tuple(map(float, range(64))))
MINUS6 = Levels("minus6", tuple(map(float, range(-63, 1))))


class Block(abc.ABC):
    """One block type: which weights it holds, and their bytes there and back."""

    kind: Kind
    holds: str

    @abc.abstractmethod
    def fits(self, w) -> bool:
        """Whether this type holds the values of a weight exactly."""

    @abc.abstractmethod
    def write(self, w) -> np.ndarray:
        """uint8 [out, bytes of a row]."""

    @abc.abstractmethod
    def read(self, rows: np.ndarray, features: int, dtype: str) -> Weight:
        """The weight of such rows."""


class Symmetric(Block):
    """Q4_0 and Q8_0: groups of 32 with one float16 scale each."""

    def __init__(self, name: str, number: int, bits: int):
        self.bits = bits
        self.kind = Kind(name, number, 32, 2 + 4 * bits)
        self.holds = f"symmetric int{bits} in groups of 32 ({name})"

    def fits(self, w) -> bool:
        try:
            s = scheme_of(w)
        except TypeError:
            return False
        plain = s.symmetric and not s.ordered and s.inputs is None
        shaped = s.bits == self.bits and min(s.block or s.features, s.features) == 32
        if not (plain and shaped and s.features % 32 == 0):
            return False
        return exact(_stored(w).scale, np.float16)

    def write(self, w) -> np.ndarray:
        stored = _stored(w)
        codes = stored.codes.T.reshape(-1, 32)
        scale = np.ascontiguousarray(stored.scale.T.astype(np.float16)).reshape(-1, 1)
        if self.bits == 4:
            codes = codes[:, :16] | codes[:, 16:] << 4
        else:
            codes = codes ^ 128
        blocks = np.concatenate([scale.view(np.uint8), codes], 1)
        return blocks.reshape(stored.scheme.outputs, -1)

    def read(self, rows: np.ndarray, features: int, dtype: str) -> Weight:
        blocks = rows.reshape(-1, self.kind.nbytes)
        scale = _halfs(blocks, 0).reshape(len(rows), -1)
        codes = blocks[:, 2:]
        if self.bits == 4:
            codes = np.concatenate([codes & 15, codes >> 4], 1)
        else:
            codes = codes ^ 128
        codes = codes.reshape(len(rows), -1)
        scheme = Scheme(self.bits, True, 32, features, len(rows))
        zero = np.full(scale.T.shape, scheme.middle, np.uint8)
        return weight(Affine(scheme, codes.T, scale.T, zero), dtype)


class Q6K(Block):
    """Q6_K: 16 groups of 16, int8 scales: doubly quantized scales hold the same."""

    kind = Kind("Q6_K", 14, SUPER, 128 + 64 + 16 + 2)
    holds = "symmetric int6 in groups of 16 with scales in sint8 blocks of 16 (Q6_K)"

    def fits(self, w) -> bool:
        return (
            isinstance(w, Quantized)
            and w.format == Integer(6, True)
            and w.block == 16
            and w.features % SUPER == 0
            and isinstance(w.scale, Quantized)
            and w.scale.format == Integer(8, True)
            and w.scale.block == 16
            and exact(np.asarray(w.scale.scale), np.float16)
        )

    def write(self, w) -> np.ndarray:
        codes = np.asarray(w.codes()).reshape(-1, 2, 2, 64)
        low, high = codes & 15, (codes >> 4).reshape(-1, 2, 4, 32)
        nibbles = low[:, :, 0] | low[:, :, 1] << 4
        pairs = sum(high[:, :, i] << 2 * i for i in range(4))
        parts = nibbles, pairs, np.asarray(w.scale.codes()) ^ 128, _units(w.scale)
        return _joined(parts, w)

    def read(self, rows: np.ndarray, features: int, dtype: str) -> Weight:
        blocks = rows.reshape(-1, self.kind.nbytes)
        low, high, scale, unit = np.split(blocks, (128, 192, 208), 1)
        low, high = low.reshape(-1, 2, 1, 64), high.reshape(-1, 2, 1, 32)
        low = (low >> _column((0, 4)) & 15).reshape(-1, SUPER)
        high = (high >> _column((0, 2, 4, 6)) & 3).reshape(-1, SUPER)
        line = _line(scale ^ 128, unit, Integer(8, True), 16)
        codes = (low | high << 4).reshape(len(rows), -1)
        planes = pack(jnp.asarray(codes), 6)
        return Quantized(planes, line, None, Integer(6, True), 16, features, dtype)


class Q4K(Block):
    """Q4_K: eight groups of 32, 6-bit scales and minima in float16 units."""

    kind = Kind("Q4_K", 12, SUPER, 2 + 2 + 12 + 128)
    holds = "what rounding to Q4_K gives"

    def fits(self, w) -> bool:
        if not (isinstance(w, Sum) and len(w.terms) == 2):
            return False
        main, minus = w.terms
        return (
            isinstance(main, Quantized)
            and isinstance(minus, Blockwise)
            and (main.format, main.block, minus.block) == (UINT4, 32, 32)
            and main.features % SUPER == 0
            and all(
                isinstance(line, Quantized)
                and (line.format, line.block) == (levels, 8)
                and exact(np.asarray(line.scale), np.float16)
                for line, levels in ((main.scale, UINT6), (minus.values, MINUS6))
            )
        )

    def write(self, w) -> np.ndarray:
        main, minus = w.terms
        scale = np.asarray(main.scale.codes()).reshape(-1, 8)
        least = 63 - np.asarray(minus.values.codes()).reshape(-1, 8)
        first, last = scale[:, :4], scale[:, 4:]
        first_min, last_min = least[:, :4], least[:, 4:]
        sixes = (
            first | last >> 4 << 6,
            first_min | last_min >> 4 << 6,
            last & 15 | last_min << 4,
        )
        codes = np.asarray(main.codes()).reshape(-1, 4, 2, 32)
        nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
        units = _units(main.scale), _units(minus.values)
        return _joined((*units, *sixes, nibbles), main)

    def read(self, rows: np.ndarray, features: int, dtype: str) -> Weight:
        blocks = rows.reshape(-1, self.kind.nbytes)
        unit, unit_min, a, b, c, codes = np.split(blocks, (2, 4, 8, 12, 16), 1)
        scale = np.concatenate([a & 63, c & 15 | a >> 6 << 4], 1)
        least = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], 1)
        codes = codes.reshape(-1, 4, 1, 32) >> _column((0, 4)) & 15
        lines = _line(scale, unit, UINT6, 8), _line(63 - least, unit_min, MINUS6, 8)
        return _shifted(codes.reshape(len(rows), -1), *lines, dtype)

    def round(self, w: np.ndarray, dtype: str) -> Weight:
        """The nearest weight to a dense one [in, out], from each group's range.

        Per 32 inputs the range [min(w, 0), max(w, 0)] in 15 steps; steps and minima
        in 6 bits of a float16 unit per 256; then the nearest codes. (llama.cpp also
        searches around the range.)
        """
        groups = np.asarray(w, np.float32).T.reshape(-1, 8, 32)
        least = np.maximum(-groups.min(-1), 0)
        step = (np.maximum(groups.max(-1), 0) + least) / 15
        scale, unit = _sixths(step)
        shift, unit_min = _sixths(least)
        step = scale * unit.astype(np.float32)
        low = shift * unit_min.astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = (groups + low[..., None]) / step[..., None]
        codes = np.clip(np.rint(np.nan_to_num(codes, posinf=0)), 0, 15)
        lines = (
            _line(scale.astype(np.uint8), unit.view(np.uint8), UINT6, 8),
            _line(63 - shift.astype(np.uint8), unit_min.view(np.uint8), MINUS6, 8),
        )
        return _shifted(codes.astype(np.uint8).reshape(w.shape[1], -1), *lines, dtype)


BLOCKS: tuple[Block, ...] = (
    Symmetric("Q4_0", 2, 4),
    Symmetric("Q8_0", 8, 8),
    Q6K(),
    Q4K(),
)


def _shifted(codes: np.ndarray, scale: Quantized, minus: Quantized, dtype: str) -> Sum:
    """Unsigned codes [out, in] times scales, and the constants of their groups."""
    outputs, features = codes.shape
    planes = pack(jnp.asarray(codes), 4)
    main = Quantized(planes, scale, None, UINT4, 32, features, dtype)
    return Sum((main, Blockwise(minus, outputs, 32, features, dtype)))


def _line(codes: np.ndarray, units: np.ndarray, format, block: int) -> Quantized:
    """Doubly quantized scales: all codes as one line, a float16 unit per ``block``."""
    unit = narrowed(np.ascontiguousarray(units).view("<f2").reshape(1, -1))
    planes = pack(jnp.asarray(codes.reshape(1, -1)), format.bits)
    return Quantized(planes, jnp.asarray(unit), None, format, block, codes.size)


def _sixths(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative values [blocks, 8] in 6 bits: (codes, unit [blocks, 1])."""
    unit = (values.max(-1, keepdims=True) / 63).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(values / unit.astype(np.float32))
    return np.clip(np.nan_to_num(codes, posinf=0), 0, 63), unit


def _units(line: Quantized) -> np.ndarray:
    """The float16 units of a line as bytes [blocks, 2]."""
    units = np.asarray(line.scale).astype(np.float16).reshape(-1, 1)
    return np.ascontiguousarray(units).view(np.uint8)


def _joined(parts, w: Quantized) -> np.ndarray:
    """Fields of super-blocks side by side, as rows [out, bytes]."""
    count = w.features * w.shape[1] // SUPER
    blocks = np.concatenate([np.reshape(p, (count, -1)) for p in parts], 1)
    return blocks.astype(np.uint8).reshape(w.shape[1], -1)


def _column(shifts: tuple[int, ...]) -> np.ndarray:
    """Shifts along the third of four axes."""
    return np.array(shifts, np.uint8).reshape(1, 1, -1, 1)


def _stored(w) -> Stored:
    """The numbers of one weight that is a tensor by itself."""
    return Stored(scheme_of(w), lambda: [w], lambda parts: parts[0])


def _halfs(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of each block, [blocks]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]
