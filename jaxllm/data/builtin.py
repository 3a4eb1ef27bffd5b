"""The built-in corpus: the Python standard library that every installation carries.

The library differs between interpreters, so the evaluation slice is committed: whole
files of one version. Training leaves out every file that has the path of an evaluation
file, its content, or (a renamed or edited version) most of its lines.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from jaxllm.data.corpora import Corpus, split_documents

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "builtin"
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}
# Generated when an interpreter is built: they hold paths of that machine.
BUILD_ARTEFACTS = ("_sysconfigdata", "config-", "sitecustomize")


def corpus(source: str, split: str) -> Corpus:
    """The split of `builtin:`; "all" is train followed by eval.

    Raises:
      ValueError: Something follows `builtin:`.
      FileNotFoundError: This interpreter has no library source, or the committed
        evaluation slice is missing.
    """
    if source != "builtin:":
        raise ValueError(f"{source!r} is not a corpus, expected 'builtin:'")
    if split == "eval":
        held = evaluation_documents()
        return Corpus("builtin:[eval]", lambda: iter(held), len(held))
    names = training_files()
    if split == "train":
        return Corpus("builtin:[train]", lambda: _read(names), len(names))
    held = evaluation_documents()

    def every() -> Iterator[str]:
        yield from _read(names)
        yield from held

    return Corpus("builtin:[all]", every, len(names) + len(held))


def library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def library_files() -> tuple[str, ...]:
    """Relative paths (with /) of the library's source files, tests left out."""
    root = library()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in paths if _is_library(path))
    if not names:
        raise FileNotFoundError(f"no Python source below {root}")
    return tuple(names)


def read_source(name: str) -> str:
    """The text of one library file, in the encoding that it declares."""
    with tokenize.open(library() / name) as file:
        return file.read()


def evaluation_documents() -> tuple[str, ...]:
    """The files of the committed evaluation slice."""
    path = ASSETS / "eval.txt"
    if not path.exists():
        raise FileNotFoundError(f"the built-in evaluation slice is missing: {path}")
    return tuple(split_documents(path.read_bytes().decode("utf-8")))


def evaluation_record() -> dict:
    """Names, hashes and sizes of the evaluation files (eval.json)."""
    return json.loads((ASSETS / "eval.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def training_files() -> tuple[str, ...]:
    """Library files that share neither path nor content with the evaluation slice.

    Empty package markers are left out as well.
    """
    record = evaluation_record()
    paths = {file["path"] for file in record["files"]}
    hashes = {file["sha256"] for file in record["files"]}
    lines = {line for text in evaluation_documents() for line in telling_lines(text)}

    def left_out(name: str) -> bool:
        if name in paths:
            return True
        text = read_source(name)
        return not text.strip() or sha256(text) in hashes or overlap(text, lines) > 0.5

    return tuple(name for name in library_files() if not left_out(name))


def overlap(text: str, lines: set[str]) -> float:
    """The fraction of a text's telling lines that are among the given ones.

    A text with fewer than eight of them says too little to be a version of another.
    """
    own = telling_lines(text)
    return len(own & lines) / len(own) if len(own) >= 8 else 0.0


def telling_lines(text: str) -> set[str]:
    """Lines long enough that two files hardly share one by chance."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 24}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _is_library(path: Path) -> bool:
    parts = set(path.parts)
    artefact = any(part.startswith(BUILD_ARTEFACTS) for part in path.parts)
    return not artefact and not parts & (NOT_LIBRARY | TESTS)


def _read(names: tuple[str, ...]) -> Iterator[str]:
    return map(read_source, names)
