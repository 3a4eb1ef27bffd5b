"""Codes as a stream of bits in 32-bit words, the lowest bits first.

GPTQ and compressed-tensors store codes so: code i of a line takes its bits i b to
i b + b - 1, whether or not it crosses from one word into the next. 32 codes fill b
words exactly, so that both functions run over 32 places and never over bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def word_count(count: int, bits: int) -> int:
    """Words of a line of ``count`` codes; the last may be short."""
    return -(-count * bits // 32)


def to_words(codes: np.ndarray, bits: int, axis: int = -1) -> np.ndarray:
    """uint8 codes < 2^bits packed along ``axis``, as int32.

    >>> to_words(np.array([1, 2, 3], np.uint8), 4).tolist()
    [801]
    """
    lines = _filled(np.moveaxis(codes, axis, -1), 32)
    words = np.zeros((*lines.shape[:-1], bits), np.uint32)
    for place, word, shift in _places(bits):
        piece = lines[..., place].astype(np.uint32)
        words[..., word] |= piece << np.uint32(shift)
        if shift + bits > 32:
            words[..., word + 1] |= piece >> np.uint32(32 - shift)
    words = words.reshape(*words.shape[:-2], -1)
    words = words[..., : word_count(codes.shape[axis], bits)].view(np.int32)
    return np.moveaxis(words, -1, axis)


def from_words(words: np.ndarray, bits: int, count: int, axis: int = -1) -> np.ndarray:
    """The first ``count`` uint8 codes of each line (inverse of ``to_words``)."""
    lines = _filled(np.moveaxis(words, axis, -1).astype(np.uint32), bits)
    codes = np.empty((*lines.shape[:-1], 32), np.uint8)
    for place, word, shift in _places(bits):
        piece = lines[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            piece = piece | lines[..., word + 1] << np.uint32(32 - shift)
        codes[..., place] = piece & np.uint32(2**bits - 1)
    codes = codes.reshape(*codes.shape[:-2], -1)[..., :count]
    return np.moveaxis(codes, -1, axis)


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """For each of 32 codes: (its place, the word where it begins, the bit there)."""
    return ((i, *divmod(i * bits, 32)) for i in range(32))


def _filled(lines: np.ndarray, size: int) -> np.ndarray:
    """Lines in runs of ``size``, the last filled with zeros."""
    short = -lines.shape[-1] % size
    lines = np.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, short)])
    return lines.reshape(*lines.shape[:-1], -1, size)
