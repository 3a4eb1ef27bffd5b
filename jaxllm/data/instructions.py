"""Instruction and preference data: the usual layouts as conversations and pairs.

    {"messages": [{"role": ..., "content": ...}, ...]}                  (OpenAI)
    {"conversations": [{"from": "human", "value": ...}, ...]}           (ShareGPT)
    {"instruction": ..., "input": ..., "output": ...}                   (Alpaca)
    {"prompt": ..., "completion": ...}

A preference pair has `chosen` and `rejected` (a text, a message or a conversation) and
its prompt in one of the layouts above, or as the part that both conversations share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.data.chat import Message
from jaxllm.data.corpora import read_rows

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
LAYOUTS = (
    "messages",
    "conversations",
    "instruction + output [+ input]",
    "prompt + completion",
)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
      prompt: The conversation up to the answer.
      chosen, rejected: The answer's messages (usually one), better and worse.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def load_conversations(path: str | Path) -> list[list[Message]]:
    """The conversations of a `.json` (a list), `.jsonl` or `.parquet` file.

    Raises:
      FileNotFoundError: No such file.
      ValueError: A row of no known layout; the error has its number and its fields.
    """
    return [_numbered(conversation, row, i, path) for i, row in _examples(path)]


def load_preferences(path: str | Path) -> list[Preference]:
    """The preference pairs of such a file; errors as `load_conversations`."""
    return [_numbered(preference, row, i, path) for i, row in _examples(path)]


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """The messages of one example.

    >>> conversation({"prompt": "1 + 1?", "completion": "2"})
    [{'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': '2'}]
    """
    if "messages" in row:
        return _messages(row["messages"])
    if "conversations" in row:
        return _messages(row["conversations"])
    if "instruction" in row and "output" in row:
        parts = [row["instruction"], row.get("input") or ""]
        question = "\n\n".join(part for part in parts if part)
        system = [_message("system", row["system"])] if row.get("system") else []
        return [*system, _message("user", question), _answer(row["output"])]
    if "prompt" in row and "completion" in row:
        return [*_prompt(row["prompt"]), *_reply(row["completion"])]
    raise ValueError(
        f"no known layout among the fields {sorted(row)}; expected one of: "
        + "; ".join(LAYOUTS)
    )


def preference(row: Mapping[str, Any]) -> Preference:
    """The pair of one example.

    >>> preference({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}).chosen
    ({'role': 'assistant', 'content': '4'},)
    """
    missing = {"chosen", "rejected"} - set(row)
    if missing:
        raise ValueError(
            f"no {' and '.join(sorted(missing))} among the fields {sorted(row)}"
        )
    chosen, rejected = _reply(row["chosen"]), _reply(row["rejected"])
    shared = _shared(chosen, rejected)
    # Whole conversations repeat the prompt; what begins with an answer goes on from it.
    repeats = bool(shared) and shared[0]["role"] != "assistant"
    prompt = shared if repeats else [*_asked(row), *shared]
    if not prompt:
        raise ValueError(f"a pair without a prompt; its fields are {sorted(row)}")
    chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected))


def _asked(row: Mapping[str, Any]) -> list[Message]:
    if "prompt" in row:
        return _prompt(row["prompt"])
    for name in ("messages", "conversations"):
        if name in row:
            return _messages(row[name])
    if "instruction" in row or "question" in row:
        system = [_message("system", row["system"])] if row.get("system") else []
        parts = [row.get("instruction") or row["question"], row.get("input") or ""]
        return [*system, _message("user", "\n\n".join(filter(None, parts)))]
    return []


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages with which both conversations begin, the answer never."""
    count = 0
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        count += 1
    return chosen[:count]


def _prompt(value: Any) -> list[Message]:
    return [_message("user", value)] if isinstance(value, str) else _messages(value)


def _reply(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [_answer(value)]
    return _messages([value] if isinstance(value, Mapping) else value)


def _answer(text: str) -> Message:
    return _message("assistant", text)


def _messages(value: Any) -> list[Message]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
        raise ValueError(f"expected a list of messages, got {value!r:.60}")
    return [_one(message) for message in value]


def _one(message: Any) -> Message:
    fields = set(message) if isinstance(message, Mapping) else set()
    if {"role", "content"} <= fields:
        return _message(message["role"], message["content"])
    if {"from", "value"} <= fields:
        role = message["from"]
        return _message(ROLES.get(role, role), message["value"])
    raise ValueError(
        f"expected a message with role and content (or from and value), "
        f"got {message!r:.60}"
    )


def _message(role: str, content: Any) -> Message:
    if not isinstance(content, str):
        kind = type(content).__name__
        raise ValueError(f"the content of a {role} message is a {kind}, not a text")
    return {"role": role, "content": content}


def _numbered(read: Any, row: Mapping[str, Any], number: int, path: str | Path) -> Any:
    try:
        return read(row)
    except ValueError as error:
        raise ValueError(f"{path}, example {number}: {error}") from None


def _examples(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no instruction data at {path}: it does not exist")
    readers = {".json": _json_rows, ".jsonl": read_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        kinds = ", ".join(readers)
        raise ValueError(f"{path} ends in {path.suffix!r}, expected one of {kinds}")
    return enumerate(readers[path.suffix](path))


def _json_rows(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of objects")
    return rows


def _parquet_rows(path: Path) -> list[dict]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()
