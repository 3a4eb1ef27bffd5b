"""Corpora: where text comes from, as re-iterable values with a content digest.

One URI scheme names every source::

    builtin:                      source of the running interpreter's standard library
    stories.txt                   documents between `<|endoftext|>` lines, else one
    chats.jsonl, c4.parquet       one document a row (field or column "text")
    folder/                       every .txt, .jsonl and .parquet file below it
    hf:name[/config]              a hub data set, streamed

Splits never leak: a document goes to "train" or "eval" by the hash of its content, so
equal documents land on the same side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "eval", "all")
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Named text that can be read again and again, always in the same order.

    Attributes:
      name: The source and split, as a report prints them.
      read: Starts a fresh pass over the documents.
      count: Number of documents where it is known without a pass.
      version: Identity of a source too large to hash (a hub data set's revision).
    """

    name: str
    read: Callable[[], Iterator[str]]
    count: int | None = None
    version: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError(f"the length of corpus {self.name!r} is not known")
        return self.count

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of the content: equal documents, equal digest."""
        if self.version is not None:
            return _sha256(f"{self.name}@{self.version}".encode())[:16]
        return digest_documents(self)


def documents(
    source: str | Path,
    split: str = "train",
    *,
    field: str = "text",
    separator: str = SEPARATOR,
    holdout: float = 0.05,
) -> Corpus:
    """The documents of one split of a source.

    Args:
      source: A URI of the scheme above.
      split: "train", "eval" or "all". A hub data set takes its own split names.
      field: Field of a JSON line, or column of a Parquet file, that holds the text.
      separator: Line that ends a document of a text file.
      holdout: Fraction of the documents of a local source that is "eval". A source of
        a single document is cut at a line near that point instead.

    Raises:
      FileNotFoundError: The path does not exist, or has nothing readable below it.
      ValueError: Unknown split, scheme or suffix, a missing field (the error lists
        the fields that exist), or a split without documents.
      ConnectionError: A hub data set cannot be reached.
    """
    source = str(source)
    if source.startswith("hf:"):
        from jaxllm.data import hub

        return hub.stream(source.removeprefix("hf:").removeprefix("//"), split, field)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if source.startswith("builtin:"):
        from jaxllm.data import builtin

        return builtin.corpus(source, split)
    return _local(source, split, field, separator, holdout)


def from_texts(texts: Iterable[str], name: str = "texts") -> Corpus:
    """A corpus of strings that are already in memory.

    >>> corpus = from_texts(["one", "two"])
    >>> list(corpus) == list(corpus), len(corpus)
    (True, 2)
    """
    held = tuple(texts)
    return Corpus(name, lambda: iter(held), len(held))


def digest_documents(texts: Iterable[str]) -> str:
    """Sixteen hex digits of a sequence of documents, boundaries included."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


def join_documents(texts: Iterable[str], separator: str = SEPARATOR) -> str:
    """One text of many documents; `split_documents` gives back exactly these.

    >>> split_documents(join_documents(["one\\n", "two"]))
    ['one\\n', 'two']
    """
    texts = list(texts)
    for text in texts:
        if separator in text:
            raise ValueError(f"a document contains the separator {separator!r}")
    return f"\n{separator}\n".join(texts)


def split_documents(text: str, separator: str = SEPARATOR) -> list[str]:
    """The documents between separator lines, whitespace kept."""
    return text.split(f"\n{separator}\n")


def _local(
    source: str, split: str, field: str, separator: str, holdout: float
) -> Corpus:
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}, expected a fraction in [0, 1)")
    files = _files(Path(source).expanduser())

    def every() -> Iterator[str]:
        parts = (_read_file(file, field, separator) for file in files)
        return filter(None, itertools.chain.from_iterable(parts))

    found = len(list(itertools.islice(every(), 2)))  # also reports bad input at once
    if found == 0:
        raise ValueError(f"{source} holds no document")
    if split == "all":
        return Corpus(f"{source}[all]", every)

    def chosen() -> Iterator[str]:
        if found == 1:
            return iter([_cut(next(every()), split, holdout)])
        return (text for text in every() if _side(text, holdout) == split)

    if not any(chosen()):
        raise ValueError(
            f"split {split!r} of {source} is empty at holdout={holdout}; "
            "use split='all' or another holdout"
        )
    return Corpus(f"{source}[{split}, holdout={holdout:g}]", chosen)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"no corpus at {path}: the file does not exist")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        if not found:
            kinds = ", ".join(SUFFIXES)
            raise FileNotFoundError(f"no {kinds} file below the folder {path}")
        return found
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
        )
    return [path]


def _read_file(path: Path, field: str, separator: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path, field)
    if path.suffix == ".parquet":
        return _read_parquet(path, field)
    return _read_text(path, separator)


def _read_text(path: Path, separator: str) -> Iterator[str]:
    lines: list[str] = []
    separated = False
    with path.open(encoding="utf-8", newline="") as file:
        for line in file:
            if line.strip() == separator:
                separated = True
                yield "".join(lines).strip()
                lines = []
            else:
                lines.append(line)
    rest = "".join(lines)
    yield rest.strip() if separated else rest


def read_rows(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file; a bad line is named with its number."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ValueError(f"{path}:{number} is a {kind}, expected an object")
            yield row


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for row in read_rows(path):
        yield text_of(row, field, str(path))


def text_of(row: dict, field: str, origin: str) -> str:
    """The text of one row, or an error that lists the fields it has."""
    if field not in row:
        raise ValueError(
            f"{origin} has no field {field!r}; its fields are {sorted(map(str, row))}"
        )
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise ValueError(f"field {field!r} of {origin} is a {kind}, expected a string")
    return row[field]


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(
                f"{path} has no column {column!r}; its columns are {names}"
            )
        for batch in file.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                yield text_of(row, column, str(path))


def _side(text: str, holdout: float) -> str:
    """The split of a document, a function of its content alone."""
    point = int(_sha256(text.encode("utf-8", "surrogatepass"))[:8], 16) / 2**32
    return "eval" if point < holdout else "train"


def _cut(text: str, split: str, holdout: float) -> str:
    """One side of a long document, cut at the line end nearest after the point."""
    point = text.find("\n", int(len(text) * (1 - holdout)))
    point = len(text) if point < 0 or holdout == 0 else point + 1
    return text[:point] if split == "train" else text[point:]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
