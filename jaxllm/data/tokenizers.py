"""Tokenizers: text to ids and back, one interface over three file formats.

`tokenizers` JSON (a Hugging Face directory), SentencePiece `.model` and llama2.c's
`tok512.bin`. What differs between them (who adds BOS, the leading space) stays inside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxllm.data.llama2c import Llama2c
from jaxllm.data.tokenizer_base import Tokenizer, hash_of, write_whole

# Looked up in this order when no configuration file names the special tokens.
CONVENTIONS = {
    "bos": ("<|bos|>", "<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>"),
    "eos": ("<|eos|>", "<|end_of_text|>", "<eos>", "</s>", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}


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
        self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1
        self.bos_id = self._special("bos")
        self.eos_id = self._special("eos")
        self.pad_id = self._special("pad")
        self._prepends_bos, self._appends_eos = self._probe()
        self.chat_template = _chat_template(self.path, self._config)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return self.encode_batch([text], bos, eos)[0]

    def encode_marked(self, text: str) -> list[int]:
        return self.encode(text, bos=False)  # finds the special tokens by itself

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
        ids = f"{start} {self.bos_id} {self.eos_id} "
        return hash_of(ids.encode() + self._json.encode())

    def token(self, index: int) -> str:
        return self._inner.id_to_token(index) or ""

    def save(self, folder: str | Path) -> None:
        write_whole(Path(folder) / "tokenizer.json", self._json.encode())
        names = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        config = dict(self._config)
        for name, index in names.items():
            if index is not None:
                config[f"{name}_token"] = self.token(index)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_config(Path(folder), config)

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
        known = (self._inner.token_to_id(t) for t in CONVENTIONS[name])
        return next((index for index in known if index is not None), None)

    def _named(self, token: Any, key: str) -> int | None:
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        index = self._inner.token_to_id(token)
        if index is None:
            raise ValueError(f"{key} {token!r} is not in the vocabulary of {self.path}")
        return index


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
        self._config = _read_json(self.path.with_name("tokenizer_config.json"))
        self._starts = self._config.get("add_bos_token") is not False
        self.chat_template = _chat_template(self.path, self._config)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        starts = bos and self._starts and self.bos_id is not None
        start = [self.bos_id] if starts else []
        return self._with_eos(start + self._inner.encode(text), eos)

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(self._checked(ids))

    @cached_property
    def fingerprint(self) -> str:
        return hash_of((b"" if self._starts else b"bare ") + self._proto)

    def token(self, index: int) -> str:
        return self._inner.id_to_piece(index)

    def save(self, folder: str | Path) -> None:
        write_whole(Path(folder) / "tokenizer.model", self._proto)
        if self._config or self.chat_template:
            config = self._config | {"chat_template": self.chat_template}
            _write_config(Path(folder), config)


def _chat_template(path: Path, config: dict) -> str | None:
    file = path.with_name("chat_template.jinja")
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default", template[0]["template"])
    return template


def _write_config(folder: Path, config: dict) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_whole(folder / "tokenizer_config.json", text.encode())


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
