"""Makes the built-in model's data: the evaluation slice and the tokenizer.

    python experiments/builtin/make_data.py            # writes into the package
    python experiments/builtin/make_data.py --out DIR  # looks without touching it

The slice is made of whole files of the Python 3.11 library, with the licence beside it,
and can only be made by that version; the tokenizer is trained on what the slice leaves.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxllm.data import builtin
from jaxllm.data.corpora import documents, join_documents

VOCABULARY = 2048
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")  # ids 0, 1, 2
LIMIT = 200_000  # bytes of the evaluation slice
FILES = (  # algorithms, text, numbers, parsing, concurrency, files, small and large
    "asyncio/queues.py",
    "bisect.py",
    "colorsys.py",
    "csv.py",
    "fractions.py",
    "glob.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/decoder.py",
    "queue.py",
    "sched.py",
    "secrets.py",
    "shlex.py",
    "textwrap.py",
)
# Words with the space, dot, underscore or bracket before them, single digits,
# punctuation, and white space: line ends take along the indentation that follows, all
# but the space that belongs to the next word.
PATTERN = (
    r"[ ._(\[]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s*\n\s*(?!\S)|\s*\n|\s+(?!\S)|\s+"
)
# Character tables and generated help would take merges from real source (on the
# slice 3.09 bytes a token without them, 3.05 with them).
TABLES = ("encodings/", "pydoc_data/", "html/entities.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=builtin.ASSETS)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_slice(out)
    tokenizer = train_tokenizer(training_texts())
    tokenizer.save(str(out / "tokenizer.json"))
    print(json.dumps(summary(tokenizer), indent=2))


def write_slice(out: Path) -> None:
    """Writes eval.txt, eval.json and the licence that covers them."""
    if sys.version_info[:2] != (3, 11):
        version = platform.python_version()
        raise SystemExit(f"the slice is Python 3.11's, this is {version}")
    texts = [builtin.read_source(name) for name in FILES]
    joined = join_documents(texts).encode()
    if len(joined) > LIMIT:
        raise SystemExit(f"the slice has {len(joined)} bytes, at most {LIMIT}")
    record = {
        "what": "whole files of the Python standard library, held out from training",
        "licence": "LICENSE.PSF.txt",
        "python": platform.python_version(),
        "bytes": len(joined),
        "files": [describe(*pair) for pair in zip(FILES, texts, strict=True)],
    }
    (out / "eval.txt").write_bytes(joined)
    (out / "eval.json").write_text(json.dumps(record, indent=2) + "\n")
    licence = (builtin.library() / "LICENSE.txt").read_bytes()
    (out / "LICENSE.PSF.txt").write_bytes(licence)


def describe(name: str, text: str) -> dict:
    size = len(text.encode())
    return {"path": name, "sha256": builtin.sha256(text), "bytes": size}


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE; every byte is a token, so that any text round-trips."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIALS[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def training_texts() -> list[str]:
    names = builtin.training_files()
    return [builtin.read_source(n) for n in names if not n.startswith(TABLES)]


def summary(tokenizer: tokenizers.Tokenizer) -> dict:
    """How well the tokenizer compresses both splits."""

    def bytes_per_token(split: str) -> float:
        texts = list(documents("builtin:", split))
        ids = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
        return round(sum(len(t.encode()) for t in texts) / ids, 3)

    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "python": platform.python_version(),
        "train_digest": documents("builtin:", "train").digest,
        "eval_digest": documents("builtin:", "eval").digest,
        "bytes_per_token": {s: bytes_per_token(s) for s in ("train", "eval")},
    }


if __name__ == "__main__":
    main()
