"""Tokenizers as GGUF metadata: ``tokenizer.ggml.*``, from the files that they save."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from jaxllm.data.llama2c import BYTES, MARKERS, parse_llama2c
from jaxllm.data.tokenizer_base import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEY = "tokenizer.ggml."
SPACE = "\u2581"


def vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The metadata by which llama.cpp builds the same tokenizer.

    SentencePiece and llama2.c files become its ``llama`` tokenizer (pieces with
    scores), byte-level BPE its ``gpt2`` (merges). A split pattern of one's own has no
    name there (``pre`` is then ``default``): texts may be cut elsewhere. ``size`` is
    the model's vocabulary: ids beyond the tokenizer's are unused ones.

    Raises ``ValueError`` for a tokenizer.json of another kind than byte-level BPE.
    """
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as folder:
        tokenizer.save(folder)
        files = {p.name: p for p in Path(folder).iterdir()}
        if "tokenizer.json" in files:
            data = json.loads(files["tokenizer.json"].read_text(encoding="utf-8"))
            out = _byte_level(data)
        elif "tokenizer.model" in files:
            out = _sentencepiece(files["tokenizer.model"])
        else:
            out = _llama2c(next(p for n, p in files.items() if n.endswith(".bin")))
    short = size - len(out["tokens"])
    out["tokens"] += [f"[PAD{i}]" for i in range(short)]
    out["token_type"] += [UNUSED] * short
    if "scores" in out:
        out["scores"] += [0.0] * short
    for name in ("bos", "eos", "padding"):
        index = getattr(tokenizer, f"{name.removesuffix('ding')}_id")
        if index is not None:
            out[f"{name}_token_id"] = index
    bare = tokenizer.encode("a", bos=False)
    out["add_bos_token"] = tokenizer.encode("a") != bare
    return {KEY + name: value for name, value in out.items()}


def _byte_level(data: dict) -> dict[str, Any]:
    """The ``gpt2`` tokenizer of a tokenizer.json."""
    model, kinds = data["model"], json.dumps(data.get("pre_tokenizer"))
    if model.get("type") != "BPE" or "ByteLevel" not in kinds:
        raise ValueError(
            f"gguf: a tokenizer.json of type {model.get('type')!r}; accepted: "
            "byte-level BPE, SentencePiece, llama2.c"
        )
    ids = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(ids, NORMAL)
    for added in data.get("added_tokens", ()):
        ids[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    count = max(ids) + 1
    return {
        "model": "gpt2",
        "pre": "gpt-2" if '"Split"' not in kinds else "default",
        "tokens": [ids.get(i, f"[PAD{i}]") for i in range(count)],
        "token_type": [types.get(i, UNUSED) for i in range(count)],
        "merges": merges,
    }


def _sentencepiece(path: Path) -> dict[str, Any]:
    """The ``llama`` tokenizer of a SentencePiece model."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def kind(i: int) -> int:
        tests = (sp.IsUnknown, UNKNOWN), (sp.IsControl, CONTROL), (sp.IsByte, BYTE)
        return next(
            (k for test, k in (*tests, (sp.IsUnused, UNUSED)) if test(i)), NORMAL
        )

    every = range(sp.vocab_size())
    return {
        "model": "llama",
        "tokens": [sp.IdToPiece(i) for i in every],
        "scores": [sp.GetScore(i) for i in every],
        "token_type": [kind(i) for i in every],
    }


def _llama2c(path: Path) -> dict[str, Any]:
    """The ``llama`` tokenizer of a llama2.c file: ids 3 to 258 are single bytes."""
    pieces, scores = parse_llama2c(path.read_bytes(), path)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(BYTES)]
    rest = pieces[MARKERS + BYTES :]
    tokens += [piece.decode("utf-8", "replace").replace(" ", SPACE) for piece in rest]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * BYTES + [NORMAL] * len(rest)
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [float(x) for x in scores],
        "token_type": types,
    }
