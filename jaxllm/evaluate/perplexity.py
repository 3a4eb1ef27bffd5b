"""Perplexity under named protocols, with every normalisation beside the number.

The same model on the same text has very different perplexities under different
protocols, so a result carries its protocol in words, the digest of the text and all
counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxllm.core.model import Model
from jaxllm.data.corpora import Corpus, digest_documents, from_texts
from jaxllm.data.packing import pack_rows
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary
from jaxllm.evaluate.likelihood import negative_log_likelihood, padded

# The window of the compression papers since GPTQ (arXiv:2210.17323).
PAPER_WINDOW = 2048
JOINER = "\n\n"
# Longer than a token is on average in any text; bounds what a limit makes us read.
CHARACTERS_PER_TOKEN = 16


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood of a text, and what it is divided by.

    Attributes:
      nll: Nats per predicted token.
      tokens: Predicted tokens.
      bytes, words: UTF-8 bytes and white-space separated words of the predicted text
        (a word counts where it begins); None where only tokens were given.
      protocol: The protocol in words.
      corpus, digest: Name and content hash of the text that was read.
    """

    nll: float
    tokens: int
    bytes: int | None
    words: int | None
    protocol: str
    corpus: str
    digest: str

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return _exp(self.nll)

    @property
    def bits_per_byte(self) -> float | None:
        per_byte = self._per(self.bytes)
        return None if per_byte is None else per_byte / math.log(2)

    @property
    def byte_perplexity(self) -> float | None:
        per_byte = self._per(self.bytes)
        return None if per_byte is None else _exp(per_byte)

    @property
    def word_perplexity(self) -> float | None:
        per_word = self._per(self.words)
        return None if per_word is None else _exp(per_word)

    def to_json(self) -> dict[str, Any]:
        """All fields and normalisations as JSON data."""
        names = ("perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        show = lambda x: "unknown" if x is None else f"{x:.4g}"  # noqa: E731
        count = lambda x: "unknown" if x is None else f"{x:,}"  # noqa: E731
        return (
            f"perplexity {self.perplexity:.4f} per token ({self.nll:.4f} nats), "
            f"{show(self.bits_per_byte)} bits per byte "
            f"(byte perplexity {show(self.byte_perplexity)}), "
            f"{show(self.word_perplexity)} per word; "
            f"{self.tokens:,} tokens, {count(self.bytes)} bytes, "
            f"{count(self.words)} words of {self.corpus} ({self.digest}); "
            f"protocol: {self.protocol}"
        )

    def _per(self, count: int | None) -> float | None:
        return None if not count else self.nll * self.tokens / count


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of tokens of which those from ``start`` on are predicted."""

    tokens: np.ndarray
    start: int


def perplexity(
    model: Model,
    tokenizer: Tokenizer | Any,
    texts: str | Iterable[str] | Corpus | None = None,
    protocol: str = "windows",
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """exp of the mean negative log-likelihood that a model gives to a text.

    Args:
      model: Any model; its logits are taken in float32.
      tokenizer: The model's tokenizer. Or token ids (int [tokens], or a sequence of
        such documents), and then ``texts`` is left out and bytes and words are unknown.
      texts: A corpus, documents, or one string (a text, not a path).
      protocol: ``windows``: documents joined by an empty line, cut into windows that do
        not overlap; the first token of a window is not predicted and an incomplete last
        window is left out, as GPTQ and its successors do (arXiv:2210.17323).
        ``strided``: windows that advance by ``stride``; each token but the first is
        predicted once, after at least ``window - stride`` tokens or all there are.
        ``documents``: each document by itself after the tokenizer's BOS, cut at
        ``window`` tokens.
      window: Tokens of a window; the smaller of 2048 and the model's length by default.
      stride: Of ``strided``; half a window by default.
      batch_size: Rows of a batch. All batches share one compilation.
      limit: Windows, or documents, to evaluate at most.
      progress: Show a progress bar where it takes more than two seconds.

    Raises:
      ValueError: An unknown protocol, sizes that do not fit the model, a tokenizer of
        another vocabulary, or a text shorter than one window.
    """
    spec = protocol_of(model, protocol, window, stride, limit)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    if hasattr(tokenizer, "encode"):
        check_vocabulary(tokenizer, model.config.vocab_size)
        read, name, digest = _read_texts(tokenizer, as_corpus(texts), spec)
    else:
        read, name, digest = _read_tokens(model, tokenizer, texts)
        tokenizer = None
    pieces = list(itertools.islice(PROTOCOLS[protocol](read, spec), limit))
    if not pieces:
        raise ValueError(_nothing(read, spec, name))
    total, count = _measure(model, pieces, spec.window, batch_size, progress)
    sizes = (None, None) if tokenizer is None else _extent(tokenizer, pieces)
    words = _describe(spec, tokenizer)
    return Perplexity(total / count, count, *sizes, words, name, digest)


@dataclasses.dataclass(frozen=True)
class _Spec:
    protocol: str
    window: int
    stride: int
    limit: int | None


def as_corpus(texts: str | Iterable[str] | Corpus | None) -> Corpus:
    """A re-iterable corpus of whatever holds text.

    Raises:
      ValueError: No text. TypeError: Something that is not text.
    """
    if texts is None:
        raise ValueError("no text to evaluate: pass a corpus, documents or a string")
    if isinstance(texts, Corpus):
        return texts
    held = [texts] if isinstance(texts, str) else list(texts)
    for text in held:
        if not isinstance(text, str):
            raise TypeError(f"a document is a {type(text).__name__}, expected a string")
    if not any(held):
        raise ValueError("no text to evaluate: all documents are empty")
    return from_texts(held)


def protocol_of(model: Model, protocol: str, window, stride, limit) -> _Spec:
    """Checked settings of ``perplexity``, defaults filled in."""
    if protocol not in PROTOCOLS:
        accepted = ", ".join(PROTOCOLS)
        raise ValueError(f"protocol is {protocol!r}, expected one of {accepted}")
    longest = model.config.max_length
    window = min(PAPER_WINDOW, longest) if window is None else window
    if not 2 <= window <= longest:
        raise ValueError(
            f"window is {window}, expected 2 to {longest} (the model's maximum length)"
        )
    if stride is not None and protocol != "strided":
        raise ValueError(f"stride={stride} belongs to 'strided', not to {protocol!r}")
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride is {stride}, expected 1 to {window - 1} (window - 1)")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more, or None")
    return _Spec(protocol, window, stride, limit)


def _read_texts(tokenizer: Tokenizer, corpus: Corpus, spec: _Spec):
    """Token documents (one joined for the window protocols), name and digest."""
    if spec.protocol == "documents":
        texts = [t for t in itertools.islice(corpus, spec.limit) if t]
        read = tokenizer.encode_batch(texts)
    else:
        texts = list(_enough(corpus, spec))
        read = [tokenizer.encode(JOINER.join(texts))]
    ids = [np.asarray(row, np.int32) for row in read]
    return ids, corpus.name, digest_documents(texts)


def _enough(corpus: Corpus, spec: _Spec) -> Iterator[str]:
    """All documents, or as many as the limit can need."""
    room = math.inf
    if spec.limit is not None:
        room = (spec.limit + 1) * spec.window * CHARACTERS_PER_TOKEN
    for text in corpus:
        yield text
        room -= len(text)
        if room <= 0:
            return


def _read_tokens(model: Model, tokens, texts):
    if texts is not None:
        kind = type(tokens).__name__
        raise TypeError(f"texts need a tokenizer, got a {kind} in its place")
    if tokens is None:
        raise ValueError("no text to evaluate: pass a tokenizer and texts, or tokens")
    nested = isinstance(tokens, list | tuple) and np.ndim(tokens[0] if tokens else 0)
    read = [np.asarray(t) for t in tokens] if nested else [np.asarray(tokens)]
    size, total = model.config.vocab_size, hashlib.sha256()
    for ids in read:
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            shape = f"{ids.dtype} of shape {ids.shape}"
            raise ValueError(f"tokens are {shape}, expected vectors of integers")
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            raise ValueError(f"tokens outside [0, {size}), the model's vocabulary")
        total.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return read, "tokens", total.hexdigest()[:16]


def _windows(read: Sequence[np.ndarray], spec: _Spec) -> Iterator[Piece]:
    stream = np.concatenate(read)
    for end in range(spec.window, len(stream) + 1, spec.window):
        yield Piece(stream[end - spec.window : end], 1)


def _strided(read: Sequence[np.ndarray], spec: _Spec) -> Iterator[Piece]:
    stream = np.concatenate(read)
    done = 1  # the first token has no context
    for begin in range(0, len(stream), spec.stride):
        end = min(begin + spec.window, len(stream))
        if end > done:
            yield Piece(stream[begin:end], done - begin)
        done = max(done, end)


def _documents(read: Sequence[np.ndarray], spec: _Spec) -> Iterator[Piece]:
    for ids in read:
        if len(ids) > 1:
            yield Piece(ids[: spec.window], 1)


PROTOCOLS: dict[str, Callable[..., Iterator[Piece]]] = {
    "windows": _windows,
    "strided": _strided,
    "documents": _documents,
}


def _describe(spec: _Spec, tokenizer: Tokenizer | None) -> str:
    begins = getattr(tokenizer, "bos_id", None) is not None
    single = "after BOS" if begins else "whose first token is not predicted"
    if tokenizer is None:
        single = "as given, first token not predicted"
    words = {
        "windows": f"non-overlapping windows of {spec.window} tokens of the "
        "concatenated text, first token of a window not predicted",
        "strided": f"windows of {spec.window} tokens with stride {spec.stride} over "
        f"the concatenated text, each token predicted once after at least "
        f"{spec.window - spec.stride} tokens or all before it",
        "documents": f"each document by itself {single}, at most {spec.window} tokens",
    }[spec.protocol]
    least = "" if spec.limit is None else f", the first {spec.limit} of them"
    return f"{spec.protocol}: {words}{least}, token-normalised"


def _nothing(read: Sequence[np.ndarray], spec: _Spec, name: str) -> str:
    tokens = sum(map(len, read))
    need = spec.window if spec.protocol == "windows" else 2
    return (
        f"{name} has {tokens} tokens, fewer than the {need} that protocol "
        f"{spec.protocol!r} needs; pass more text or a smaller window"
    )


def _measure(model: Model, pieces, length: int, batch_size: int, progress: bool):
    """(summed nats, predicted tokens) of all pieces, packed into equal rows."""
    share = [np.arange(len(p.tokens)) >= p.start for p in pieces]
    rows = pack_rows((p.tokens for p in pieces), length, weights=share, fit="best")
    size = min(batch_size, len(rows))
    total = 0.0
    steps = range(0, len(rows), size)
    for start in tqdm(steps, "perplexity", delay=2, leave=False, disable=not progress):
        part = padded(rows.take(range(start, min(start + size, len(rows)))), size)
        nats = negative_log_likelihood(model, part)
        total += float(np.asarray(nats, np.float64).sum())
    return total, int(sum(s.sum() for s in share))


def _extent(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> tuple[int, int]:
    """UTF-8 bytes and words of the predicted text.

    What a context decodes to is subtracted, so that a marker or a leading space that
    decoding drops does not count.
    """
    octets = words = 0
    for piece in pieces:
        whole = tokenizer.decode(piece.tokens)
        before = tokenizer.decode(piece.tokens[: piece.start])
        octets += len(whole.encode()) - len(before.encode())
        words += len(whole.split()) - len(before.split())
    return octets, words


def _exp(x: float) -> float:
    return math.exp(x) if not x > 700 else math.inf
