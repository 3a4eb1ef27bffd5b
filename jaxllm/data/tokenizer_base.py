"""What every tokenizer can do, whatever its file format."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path


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

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are written out, as templates do."""
        special = {
            self.token(index): index
            for index in (self.bos_id, self.eos_id, self.pad_id)
            if index is not None and self.token(index)
        }
        pattern = "|".join(map(re.escape, special)) or r"(?!)"
        ids: list[int] = []
        for part in filter(None, re.split(f"({pattern})", text)):
            mark = special.get(part)
            ids += [mark] if mark is not None else self.encode(part, bos=False)
        return ids

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


def hash_of(data: bytes) -> str:
    """Sixteen hex digits of the content."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_whole(path: Path, data: bytes) -> None:
    """Writes under a temporary name first, so that no half file is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
