"""Packing: documents of any length into rows of one length, boundaries kept.

A packed row says where each document lies: `segments` counts documents from 1 (0 is
padding), `positions` restarts at 0 with each. A document cut at the end of a row goes
on in the next one as a segment of its own, because attention cannot look back there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxllm.core.batch import Batch


class Piece(NamedTuple):
    """A stretch of a document, at most one row long."""

    tokens: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows in host memory.

    Attributes:
      tokens, segments, positions: int32 [rows, length].
      weights: float32 [rows, length], 0 on padding.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at these indices, in this order."""
        parts = (self.tokens, self.segments, self.positions, self.weights)
        return Rows(*(part[np.asarray(indices, int)] for part in parts))

    def batch(self) -> Batch:
        """The same rows as device arrays."""
        return Batch(
            tokens=jnp.asarray(self.tokens, jnp.int32),
            segments=jnp.asarray(self.segments, jnp.int32),
            positions=jnp.asarray(self.positions, jnp.int32),
            weights=jnp.asarray(self.weights, jnp.float32),
        )


def pack(
    documents: Iterable[Sequence[int]],
    length: int,
    *,
    weights: Iterable[Sequence[float]] | None = None,
    fit: str = "stream",
    pad_id: int = 0,
) -> Batch:
    """Packs token documents into one batch; see `pack_rows`.

    >>> batch = pack([[5, 6, 7], [8, 9]], length=4)
    >>> batch.tokens.tolist()
    [[5, 6, 7, 8], [9, 0, 0, 0]]
    >>> batch.segments.tolist()
    [[1, 1, 1, 2], [1, 0, 0, 0]]
    """
    return pack_rows(documents, length, weights=weights, fit=fit, pad_id=pad_id).batch()


def pack_rows(
    documents: Iterable[Sequence[int]],
    length: int,
    *,
    weights: Iterable[Sequence[float]] | None = None,
    fit: str = "stream",
    pad_id: int = 0,
) -> Rows:
    """Packs token documents into rows, each token exactly once.

    Args:
      documents: Token ids of each document.
      length: Tokens of a row.
      weights: Weight of each token of each document; 1 where not given.
      fit: "stream" fills rows in document order and cuts at row ends: only the last
        row has padding. "best" keeps documents whole where they fit (longer ones are
        cut to rows), each into the row with the least space that takes it, longest
        first (best-fit decreasing; Ding et al. 2024, arXiv:2404.10830).
      pad_id: Token of the padding.

    Raises:
      ValueError: No tokens, length < 1, an unknown fit, or weights whose lengths
        differ from the documents'.
    """
    if length < 1:
        raise ValueError(f"length is {length}, expected 1 or more")
    placers = {"stream": _stream, "best": _best_fit}
    if fit not in placers:
        raise ValueError(f"fit is {fit!r}, expected one of {', '.join(placers)}")
    whole = _weighted(documents, weights)
    if not whole:
        raise ValueError("nothing to pack: the documents hold no tokens")
    return _render(placers[fit](whole, length), length, pad_id)


def _weighted(documents: Iterable, weights: Iterable | None) -> list[Piece]:
    if weights is None:
        arrays = (np.asarray(tokens, np.int32) for tokens in documents)
        pieces = [Piece(tokens, np.ones(len(tokens), np.float32)) for tokens in arrays]
    else:
        pieces = [
            Piece(np.asarray(tokens, np.int32), np.asarray(weight, np.float32))
            for tokens, weight in zip(documents, weights, strict=True)
        ]
    for number, (tokens, weight) in enumerate(pieces):
        if tokens.ndim != 1 or tokens.shape != weight.shape:
            raise ValueError(
                f"document {number} has tokens of shape {tokens.shape} and weights of "
                f"shape {weight.shape}, expected two vectors of one length"
            )
    return [piece for piece in pieces if len(piece.tokens)]


def _stream(pieces: list[Piece], length: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = [[]]
    room = length
    for piece in pieces:
        while len(piece.tokens):
            if room == 0:
                rows.append([])
                room = length
            head, piece = _split(piece, room)
            rows[-1].append(head)
            room -= len(head.tokens)
    return rows


def _best_fit(pieces: list[Piece], length: int) -> list[list[Piece]]:
    cut = [part for piece in pieces for part in _stream_one(piece, length)]
    rows: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in sorted(cut, key=lambda part: -len(part.tokens)):
        size = len(piece.tokens)
        place = bisect.bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > size:
            bisect.insort(rooms, (room - size, row))
    return rows


def _stream_one(piece: Piece, length: int) -> list[Piece]:
    return [row[0] for row in _stream([piece], length)]


def _split(piece: Piece, at: int) -> tuple[Piece, Piece]:
    tokens, weights = piece
    return Piece(tokens[:at], weights[:at]), Piece(tokens[at:], weights[at:])


def _render(rows: list[list[Piece]], length: int, pad_id: int) -> Rows:
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces, 1):
            span = slice(start, start + len(piece.tokens))
            tokens[row, span], weights[row, span] = piece
            segments[row, span] = number
            positions[row, span] = np.arange(len(piece.tokens))
            start = span.stop
    return Rows(tokens, segments, positions, weights)
