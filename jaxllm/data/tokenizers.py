"""Tokenizers: text to ids and back, one interface over three file formats.

`tokenizers` JSON (a Hugging Face directory), SentencePiece `.model` and llama2.c's
`tok512.bin`. What differs between them (who adds BOS, the leading space) stays inside.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
      vocab_size: Number of ids, added tokens included.
      bos_id, eos_id, pad_id: Special ids, or None where the tokenizer has none.
      chat_template: A Jinja template of a conversation, or None.
    """

    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None

    @abstractmethod
    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          text: Any string.
          bos: Start as the tokenizer starts a sequence by itself; False gives the
            bare ids of the text.
          eos: End with `eos_id`.
        """

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[list[int]]:
        """Ids of several texts; the same ids as `encode` of each."""
        return [self.encode(text, bos, eos) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens leave no trace."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Sixteen hex digits of what decides the ids."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` reads it back."""

    def token(self, index: int) -> str:
        """The text of a special id, "" where the tokenizer has no such token."""
        return ""

    def _with_eos(self, ids: list[int], eos: bool) -> list[int]:
        if not eos:
            return ids
        if self.eos_id is None:
            raise ValueError("eos=True, but this tokenizer has no end-of-sequence id")
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"id {index} is outside [0, {self.vocab_size})")
        return ids


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      source: `builtin:tiny`, a Hugging Face directory (or its tokenizer.json), a
        SentencePiece `.model` file, a llama2.c `.bin` file, or `hf://org/name`.

    Raises:
      FileNotFoundError: Nothing there, or a folder without a tokenizer file.
      ValueError: A file of another format.
    """
    source = str(source)
    if source.startswith("builtin:"):
        return _load_builtin(source)
    if source.startswith(("hf://", "hf:")):
        from jaxllm.data import hub

        return load_tokenizer(hub.download_tokenizer(source))
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: it does not exist")
    path = _tokenizer_file(path) if path.is_dir() else path
    readers = {".json": HuggingFace, ".model": SentencePiece, ".bin": Llama2c}
    if path.suffix not in readers:
        raise ValueError(f"{path} is no tokenizer: expected {', '.join(readers)}")
    return readers[path.suffix](path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids do not fit a model's vocabulary.

    A model may have more rows than the tokenizer has ids (padded embeddings), but not
    twice as many, which means that the two were not made for each other.

    Raises:
      ValueError: Names both sizes.
    """
    size = tokenizer.vocab_size
    if size > vocab_size or vocab_size >= 2 * size:
        raise ValueError(
            f"wrong tokenizer for the model: the tokenizer has {size} ids, "
            f"the model's vocabulary {vocab_size}"
        )


def _load_builtin(source: str) -> Tokenizer:
    from jaxllm.data.builtin import ASSETS

    if source not in ("builtin:", "builtin:tiny"):
        raise ValueError(f"{source!r} is not a tokenizer, expected 'builtin:tiny'")
    return HuggingFace(ASSETS / "tokenizer.json")


def _tokenizer_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            return folder / name
    binaries = sorted(folder.glob("tok*.bin"))
    if len(binaries) == 1:
        return binaries[0]
    raise FileNotFoundError(
        f"no tokenizer in {folder}: expected tokenizer.json, tokenizer.model "
        "or one tok*.bin"
    )


class HuggingFace(Tokenizer):
    """`tokenizer.json` of the `tokenizers` library, with the special ids beside it."""

    # Looked up in this order when no configuration file names the special tokens.
    CONVENTIONS = {
        "bos": ("<|bos|>", "<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>"),
        "eos": ("<|eos|>", "<|end_of_text|>", "<eos>", "</s>", "<|endoftext|>"),
        "pad": ("<|pad|>", "<pad>", "[PAD]"),
    }

    def __init__(self, path: Path):
        import tokenizers

        self.path = Path(path)
        try:
            self._json = self.path.read_text(encoding="utf-8")
            self._inner = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizers file: {error}") from None
        self._inner.no_padding()  # a file may carry the settings of a training run
        self._inner.no_truncation()
        self._config = _read_json(self.path.with_name("tokenizer_config.json"))
        self._map = _read_json(self.path.with_name("special_tokens_map.json"))
        self.vocab_size = self._inner.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special("bos")
        self.eos_id = self._special("eos")
        self.pad_id = self._special("pad")
        self._prepends_bos, self._appends_eos = self._probe()
        self.chat_template = self._template()

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False
    ) -> list[list[int]]:
        found = self._inner.encode_batch(list(texts), add_special_tokens=bos)
        rows = (self._ends(encoding.ids) if bos else encoding.ids for encoding in found)
        return [self._with_eos(ids, eos) for ids in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(self._checked(ids), skip_special_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        start = self._config.get("add_bos_token")
        return _fingerprint(f"{start} {self.bos_id} {self.eos_id} {self._json}".encode())

    def token(self, index: int) -> str:
        return self._inner.id_to_token(index) or ""

    def save(self, folder: str | Path) -> None:
        _write(Path(folder) / "tokenizer.json", self._json.encode())
        names = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        config = dict(self._config)
        for name, index in names.items():
            if index is not None:
                config[f"{name}_token"] = self.token(index)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        _write(Path(folder) / "tokenizer_config.json", text.encode())

    def _ends(self, ids: list[int]) -> list[int]:
        """The start that the configuration asks for, and no end token."""
        if self._appends_eos and ids[-1:] == [self.eos_id]:
            ids = ids[:-1]
        starts = self.bos_id is not None and ids[:1] == [self.bos_id]
        wanted = self._config.get("add_bos_token")
        if wanted is True and not starts and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids[1:] if wanted is False and starts and self._prepends_bos else ids

    def _probe(self) -> tuple[bool, bool]:
        """Whether the post-processor itself puts BOS before and EOS after a text."""
        bare = self._inner.encode("a", add_special_tokens=False).ids
        full = self._inner.encode("a", add_special_tokens=True).ids
        before = full != bare and full[:1] == [self.bos_id]
        after = full != bare and full[-1:] == [self.eos_id]
        return before, after

    def _special(self, name: str) -> int | None:
        key = f"{name}_token"
        for config in (self._config, self._map):
            if key in config:
                return self._named(config[key], key)
        known = (self._inner.token_to_id(t) for t in self.CONVENTIONS[name])
        return next((index for index in known if index is not None), None)

    def _named(self, token: Any, key: str) -> int | None:
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        index = self._inner.token_to_id(token)
        if index is None:
            raise ValueError(f"{key} {token!r} is not in the vocabulary of {self.path}")
        return index

    def _template(self) -> str | None:
        file = self.path.with_name("chat_template.jinja")
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            return named.get("default", template[0]["template"])
        return template


class SentencePiece(Tokenizer):
    """A SentencePiece `.model` (Llama 1 and 2, Mistral, Gemma, T5)."""

    def __init__(self, path: Path):
        import sentencepiece

        self.path = Path(path)
        self._proto = self.path.read_bytes()
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size = self._inner.vocab_size()
        ids = (self._inner.bos_id(), self._inner.eos_id(), self._inner.pad_id())
        self.bos_id, self.eos_id, self.pad_id = (i if i >= 0 else None for i in ids)
        config = _read_json(self.path.with_name("tokenizer_config.json"))
        self.chat_template = config.get("chat_template")

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return self._with_eos(start + self._inner.encode(text), eos)

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(self._checked(ids))

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self._proto)

    def token(self, index: int) -> str:
        return self._inner.id_to_piece(index)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder) / "tokenizer.model", self._proto)
        config = self.path.with_name("tokenizer_config.json")
        if config.exists():
            shutil.copyfile(config, Path(folder) / config.name)


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
        self._pieces, self._scores = _parse_llama2c(self._data, self.path)
        self.vocab_size = len(self._pieces)
        named = list(enumerate(self._pieces))[3:]  # never the markers from text
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
        return _fingerprint(self._data)

    def token(self, index: int) -> str:
        return self._pieces[index].decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        _write(Path(folder) / self.path.name, self._data)

    def _encode_piece(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for character in text:
            data = character.encode("utf-8")
            known = self._index.get(data)
            ids.extend([byte + 3 for byte in data] if known is None else [known])
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
        return bytes([index - 3]) if 3 <= index < 259 else self._pieces[index]


def _parse_llama2c(data: bytes, path: Path) -> tuple[list[bytes], list[float]]:
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
    if len(pieces) < 259:
        raise ValueError(f"{path} has {len(pieces)} pieces, expected 259 or more")
    return pieces, scores


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    """Writes under a temporary name first, so that no half file is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
