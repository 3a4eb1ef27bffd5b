"""Calibration sets: the small, named sample of text that compression looks at.

A `Calibration` is a value: it can be read any number of times, and its fields (source,
samples, length, seed, content digest) are what a report and a checkpoint record.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.data.corpora import Corpus, documents
from jaxllm.data.packing import Rows, pack_rows
from jaxllm.data.tokenizers import Tokenizer

MODES = ("windows", "documents")
# Of a large source, windows are drawn from a seeded choice among its first documents,
# of about this many times the tokens that the windows hold.
FIRST_DOCUMENTS = 10_000
OVERSAMPLING = 4
# No text has more characters a token: what a row cannot reach is not tokenised.
LONGEST_MEAN = 32


@dataclass(frozen=True)
class Calibration:
    """A re-iterable sample of token rows; iterating gives batches of them.

    Attributes:
      source: Where the text came from.
      samples, length: Rows, and tokens of a row.
      seed: Of the draw.
      digest: Content hash of the rows (16 hex digits).
      batch_size: Rows of a batch; the last batch may be smaller.
      mode: "windows" or "documents".
    """

    source: str
    samples: int
    length: int
    seed: int
    digest: str
    batch_size: int = 8
    mode: str = "windows"
    rows: Rows = field(repr=False, compare=False, kw_only=True)

    @classmethod
    def from_tokens(
        cls,
        tokens: np.ndarray,
        batch_size: int = 8,
        source: str = "tokens",
    ) -> Calibration:
        """A calibration set of given token rows, int [samples, length].

        Raises:
          ValueError: Not a non-empty matrix of integers.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}, "
                "expected integers [samples, length]"
            )
        return cls.from_rows(_plain_rows(tokens), source, batch_size, mode="windows")

    @classmethod
    def from_rows(
        cls,
        rows: Rows,
        source: str,
        batch_size: int = 8,
        seed: int = 0,
        mode: str = "documents",
    ) -> Calibration:
        """A calibration set of packed rows (`pack_rows`), boundaries and weights kept.

        Raises:
          ValueError: batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        shape, digest = rows.tokens.shape, _digest(rows)
        return cls(source, *shape, seed, digest, batch_size, mode, rows=rows)

    @property
    def tokens(self) -> np.ndarray:
        """All rows, int32 [samples, length]."""
        return self.rows.tokens

    @property
    def spec(self) -> dict:
        """What a manifest records."""
        names = ("source", "samples", "length", "seed", "digest", "mode")
        return {name: getattr(self, name) for name in names}

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.samples, self.batch_size):
            stop = min(start + self.batch_size, self.samples)
            rows = self.rows.take(range(start, stop))
            batch = rows.batch()
            yield batch if self.mode == "documents" else Batch(tokens=batch.tokens)


def calibrate(
    source: str | Path | Corpus,
    tokenizer: Tokenizer,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    mode: str = "windows",
) -> Calibration:
    """Draws a calibration set.

    Args:
      source: A corpus, or the URI of one (its "train" split, so that nothing of the
        evaluation slice is seen).
      tokenizer: The model's tokenizer.
      samples: Rows.
      length: Tokens of a row.
      seed: Decides documents and offsets.
      batch_size: Rows of a batch.
      mode: "windows" cuts windows at random offsets of the token stream, documents
        one after the other with the tokenizer's BOS between them, as GPTQ
        (arXiv:2210.17323) and Wanda (arXiv:2306.11695) do with C4 and WikiText.
        "documents" starts every row at a document's BOS and packs the following ones
        behind it, whole where they fit; documents longer than a row are truncated.

    Raises:
      ValueError: The source holds fewer tokens than one window (both lengths named),
        or in mode "documents" fewer rows than `samples`; a count below 1; unknown mode.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    corpus = source if isinstance(source, Corpus) else documents(source)
    rng = np.random.default_rng(seed)
    limit = length if mode == "documents" else None
    tokens = _draw_documents(corpus, tokenizer, samples * length, limit, rng)
    draw = _windows if mode == "windows" else _documents
    rows = draw(tokens, samples, length, rng, corpus.name)
    return Calibration.from_rows(rows, corpus.name, batch_size, seed, mode)


def _draw_documents(
    corpus: Corpus,
    tokenizer: Tokenizer,
    needed: int,
    limit: int | None,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Token documents, cut at a limit, in seeded order, enough to draw from."""
    texts = list(itertools.islice(corpus, FIRST_DOCUMENTS))
    characters = None if limit is None else limit * LONGEST_MEAN
    drawn, count = [], 0
    for index in rng.permutation(len(texts)):
        drawn.append(tokenizer.encode(texts[index][:characters])[:limit])
        count += len(drawn[-1])
        if count >= OVERSAMPLING * needed:
            break
    return drawn


def _windows(
    tokens: list[list[int]],
    samples: int,
    length: int,
    rng: np.random.Generator,
    name: str,
) -> Rows:
    stream = np.fromiter(itertools.chain.from_iterable(tokens), np.int32)
    if len(stream) < length:
        raise ValueError(
            f"calibration data is shorter than one window: {name} has {len(stream)} "
            f"tokens, a window {length}"
        )
    starts = rng.integers(0, len(stream) - length + 1, size=samples)
    return _plain_rows(stream[starts[:, None] + np.arange(length)])


def _documents(
    tokens: list[list[int]],
    samples: int,
    length: int,
    rng: np.random.Generator,
    name: str,
) -> Rows:
    rows = pack_rows(tokens, length, fit="best")
    if len(rows) < samples:
        raise ValueError(
            f"{name} fills {len(rows)} rows of {length} tokens, fewer than the "
            f"{samples} samples asked for"
        )
    # Best fit puts long documents first; a random choice among the rows does not.
    return rows.take(rng.permutation(len(rows))[:samples])


def _plain_rows(tokens: np.ndarray) -> Rows:
    """Rows that are one document each, without padding."""
    shape = tokens.shape
    return Rows(
        tokens=np.ascontiguousarray(tokens, np.int32),
        segments=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        weights=np.ones(shape, np.float32),
    )


def _digest(rows: Rows) -> str:
    total = hashlib.sha256(repr(rows.tokens.shape).encode())
    for part in (rows.tokens, rows.segments, rows.weights):
        kind = part.dtype.newbyteorder("<")
        total.update(np.ascontiguousarray(part, kind).tobytes())
    return total.hexdigest()[:16]
