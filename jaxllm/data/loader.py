"""Training batches as a pure function of (seed, step): resuming is knowing the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.data.corpora import Corpus, documents
from jaxllm.data.packing import Rows
from jaxllm.data.token_cache import StreamRows, tokenise
from jaxllm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Batches:
    """Rows in an order that the seed decides, each once per epoch.

    Row i of the whole run is row `permutation(seed, i // rows)[i % rows]`; step s takes
    rows s * batch_size and on. Process p of n takes the p-th of n equal parts of a
    batch: in process order, the parts are the single process's batch.

    Attributes:
      rows: What is batched: rows of a token stream, or packed rows.
      batch_size: Rows of a global batch.
      seed: Of the order.
      shuffle: False keeps the rows' own order in every epoch.
      process_index, process_count: This process among all.

    Raises:
      ValueError: No rows, or a batch that does not split over the processes.
    """

    rows: StreamRows | Rows
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise ValueError("there is no row to make batches of")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index is {self.process_index}, expected one of "
                f"{self.process_count} processes"
            )
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"a batch of {self.batch_size} rows does not split over "
                f"{self.process_count} processes"
            )

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every row has been seen once, in general not whole."""
        return len(self.rows) / self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """The rows that this process takes at a step."""
        if step < 0:
            raise ValueError(f"step is {step}, expected 0 or more")
        share = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * share
        places = range(first, first + share)
        count = len(self.rows)
        if not self.shuffle:
            return np.array([place % count for place in places])
        turns = (divmod(place, count) for place in places)
        return np.array([_order(self.seed, turn, count)[at] for turn, at in turns])

    def batch(self, step: int) -> Batch:
        """The batch of a step: int32 [batch_size / process_count, length]."""
        return self.rows.take(self.indices(step)).batch()

    def steps(self, start: int = 0) -> Iterator[Batch]:
        """Batches from a step on, without end."""
        step = start
        while True:
            yield self.batch(step)
            step += 1


def batches(
    source: str | Path | Corpus,
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    seed: int = 0,
    *,
    split: str = "train",
    eos: bool = True,
    max_tokens: int | None = None,
    shuffle: bool = True,
    cache: str | Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of a corpus, tokenised once (see `tokenise`) and cut into rows.

    Raises:
      ValueError: The corpus holds fewer tokens than one row.
    """
    corpus = source if isinstance(source, Corpus) else documents(source, split)
    stream = tokenise(corpus, tokenizer, eos=eos, max_tokens=max_tokens, cache=cache)
    return Batches(
        stream.rows(length), batch_size, seed, shuffle, process_index, process_count
    )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
