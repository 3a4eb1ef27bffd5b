"""A corpus tokenised once: a memory-mapped stream of ids, kept on disk between runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxllm.data.corpora import Corpus
from jaxllm.data.packing import Rows
from jaxllm.data.tokenizers import Tokenizer

LAYOUT = 1  # raised when the files' meaning changes
CHUNK = 256  # documents tokenised at a time


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Token ids of many documents, one after the other.

    Attributes:
      tokens: Unsigned integers [count], a memory map where it comes from disk.
      starts: int64 [documents], where each document begins.
      digest: Of corpus, tokenizer and options: equal digest, equal ids.
    """

    tokens: np.ndarray
    starts: np.ndarray
    digest: str

    def rows(self, length: int) -> StreamRows:
        """The stream cut into rows; a tail shorter than a row is left out.

        Raises:
          ValueError: length below 1, or longer than the stream.
        """
        if not 1 <= length <= len(self.tokens):
            raise ValueError(
                f"a row of {length} tokens does not fit a stream of {len(self.tokens)}"
            )
        return StreamRows(self, length)


@dataclass(frozen=True, eq=False)
class StreamRows:
    """A token stream as rows of one length, read from disk only where asked for."""

    stream: TokenStream
    length: int

    def __len__(self) -> int:
        return len(self.stream.tokens) // self.length

    @property
    def digest(self) -> str:
        return self.stream.digest

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at these indices; segments and positions from the boundaries."""
        first = np.asarray(indices, np.int64)[:, None] * self.length
        at = first + np.arange(self.length)
        starts = self.stream.starts
        document = np.searchsorted(starts, at, side="right")  # from 1
        begin = np.maximum(starts[document - 1], first)
        return Rows(
            tokens=self.stream.tokens[at].astype(np.int32),
            segments=(document - document[:, :1] + 1).astype(np.int32),
            positions=(at - begin).astype(np.int32),
            weights=np.ones(at.shape, np.float32),
        )


def tokenise(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    eos: bool = True,
    max_tokens: int | None = None,
    cache: str | Path | None = None,
) -> TokenStream:
    """The token stream of a corpus, from the cache where it has been made before.

    Args:
      corpus: Documents.
      tokenizer: Each document starts with its BOS, where it has one.
      eos: End each document with EOS, where the tokenizer has one.
      max_tokens: Stop after the document that reaches this count (a hub data set may
        have no end).
      cache: Folder of the cache; default `$XDG_CACHE_HOME/jaxllm/tokens`.

    Raises:
      ValueError: The corpus holds no tokens.
    """
    eos = eos and tokenizer.eos_id is not None
    key = f"{LAYOUT} {corpus.digest} {tokenizer.fingerprint} {eos} {max_tokens}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    root = Path(cache) if cache is not None else default_cache()
    folder = root.expanduser() / digest
    if not (folder / "meta.json").exists():
        documents = _encode(corpus, tokenizer, eos, max_tokens)
        kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        about = {"corpus": corpus.name, "tokenizer": tokenizer.fingerprint}
        _write(folder, documents, np.dtype(kind), about)
    return _open(folder, digest)


def default_cache() -> Path:
    """The user's cache folder for token streams."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "jaxllm" / "tokens"


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, eos: bool, max_tokens: int | None
) -> Iterator[list[int]]:
    count = 0
    texts = iter(tqdm(corpus, f"tokenise {corpus.name}", corpus.count, delay=2))
    while chunk := list(itertools.islice(texts, CHUNK)):
        for ids in filter(None, tokenizer.encode_batch(chunk, eos=eos)):
            yield ids
            count += len(ids)
            if max_tokens is not None and count >= max_tokens:
                return


def _write(
    folder: Path, documents: Iterator[list[int]], kind: np.dtype, about: dict
) -> None:
    """Writes beside the final name and renames, so that a cache entry is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        lengths = []
        with (part / "tokens.bin").open("wb") as file:
            for ids in documents:
                lengths.append(len(ids))
                file.write(np.asarray(ids, kind).tobytes())
        if not sum(lengths):
            raise ValueError(f"corpus {about['corpus']} holds no tokens")
        starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        np.save(part / "starts.npy", starts)
        meta = about | {"dtype": kind.name, "tokens": sum(lengths)}
        (part / "meta.json").write_text(json.dumps(meta, indent=2))
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:  # another process made the same entry in the meantime
        if not (folder / "meta.json").exists():
            raise


def _open(folder: Path, digest: str) -> TokenStream:
    meta = json.loads((folder / "meta.json").read_text())
    kind = np.dtype(meta["dtype"])
    size = (folder / "tokens.bin").stat().st_size
    if size != meta["tokens"] * kind.itemsize:
        raise ValueError(
            f"the token cache {folder} is damaged ({size} bytes, expected "
            f"{meta['tokens'] * kind.itemsize}); delete that folder"
        )
    tokens = np.memmap(folder / "tokens.bin", kind, mode="r")
    return TokenStream(tokens, np.load(folder / "starts.npy"), digest)
