"""llama2.c's tokenizer file: greedy byte-pair merges by score, with byte fallback."""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from jaxllm.data.tokenizer_base import Tokenizer, hash_of, write_whole

MARKERS = 3  # unknown, BOS, EOS
BYTES = 256  # single bytes follow the markers


class Llama2c(Tokenizer):
    """llama2.c's `tok512.bin`: int32 longest piece, then (float32 score, int32 length,
    bytes) for each id; 0 unknown, 1 BOS, 2 EOS, 3-258 single bytes.

    Encoding merges, again and again, the neighbouring pair with the best score (run.c,
    `encode`); the text gets a leading space, which decoding after BOS takes away.
    """

    bos_id = 1
    eos_id = 2

    def __init__(self, path: Path):
        self.path = Path(path)
        self._data = self.path.read_bytes()
        self._pieces, self._scores = parse_llama2c(self._data, self.path)
        self.vocab_size = len(self._pieces)
        named = list(enumerate(self._pieces))[MARKERS:]  # never the markers from text
        self._index = {piece: index for index, piece in reversed(named)}
        # Where no piece has a space inside, no merge crosses the start of a word:
        # each word is merged once and remembered.
        self._by_word = not any(b" " in piece[1:] for _, piece in named)
        self._word = lru_cache(maxsize=1 << 16)(self._encode_piece)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        text = f" {text}" if text else ""
        words = re.findall(r" ?[^ ]+| ", text) if self._by_word else [text]
        ids = [index for word in words for index in self._word(word)]
        return self._with_eos([self.bos_id, *ids] if bos else ids, eos)

    def decode(self, ids: Sequence[int]) -> str:
        parts, before = [], None
        for index in self._checked(ids):
            data = self._bytes(index)
            parts.append(data.removeprefix(b" ") if before == self.bos_id else data)
            before = index
        return b"".join(parts).decode("utf-8", "replace")

    @cached_property
    def fingerprint(self) -> str:
        return hash_of(self._data)

    def token(self, index: int) -> str:
        return self._pieces[index].strip(b"\n").decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        write_whole(Path(folder) / self.path.name, self._data)

    def _encode_piece(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for character in text:
            data = character.encode("utf-8")
            known = self._index.get(data)
            ids.extend([byte + MARKERS for byte in data] if known is None else [known])
        return tuple(self._merge(ids))

    def _merge(self, ids: list[int]) -> list[int]:
        """Merges the best pair until none is left; of equal scores the leftmost.

        A linked list with a heap of candidate pairs: n log n instead of run.c's n^2.
        """
        alive: list[int | None] = list(ids)
        before = list(range(-1, len(ids) - 1))
        after = list(range(1, len(ids) + 1))
        heap: list[tuple] = []

        def offer(i: int, j: int) -> None:
            if i < 0 or j >= len(ids):
                return
            joined = self._index.get(self._pieces[alive[i]] + self._pieces[alive[j]])
            if joined is not None:
                entry = (-self._scores[joined], i, j, alive[i], alive[j], joined)
                heapq.heappush(heap, entry)

        for i in range(len(ids) - 1):
            offer(i, i + 1)
        while heap:
            _, i, j, left, right, joined = heapq.heappop(heap)
            if (alive[i], alive[j], after[i]) != (left, right, j):
                continue  # one of the two has been merged since
            alive[i], alive[j], after[i] = joined, None, after[j]
            if after[j] < len(ids):
                before[after[j]] = i
            offer(before[i], i)
            offer(i, after[i])
        return [index for index in alive if index is not None]

    def _bytes(self, index: int) -> bytes:
        if index in (self.bos_id, self.eos_id):
            return b""
        if MARKERS <= index < MARKERS + BYTES:
            return bytes([index - MARKERS])
        return self._pieces[index]


def parse_llama2c(data: bytes, path: Path) -> tuple[list[bytes], list[float]]:
    """Pieces and scores of a tokenizer file; ``path`` is for messages."""
    pieces, scores, at = [], [], 4
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError(f"{path} ends inside a piece: not a llama2.c tokenizer")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise ValueError(f"{path} has a piece of {length} bytes: not a tokenizer")
        pieces.append(data[at : at + length])
        scores.append(score)
        at += length
    if len(pieces) < MARKERS + BYTES:
        least = MARKERS + BYTES
        raise ValueError(f"{path} has {len(pieces)} pieces, expected {least} or more")
    return pieces, scores
