"""Generation tasks: the model writes an answer, which must match exactly."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from jaxllm.core.model import Model
from jaxllm.data.corpora import read_rows
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.evaluate.score import Score
from jaxllm.generation import generate


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt and the answer to find; ``solution`` is a worked answer for examples."""

    prompt: str
    answer: str
    solution: str | None = None


def normalise(text: str) -> str:
    """Case, spaces, thousands separators, currency and a final stop do not count.

    >>> normalise("  $1,234. ") == normalise("1234")
    True
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.casefold()).replace("$", "")
    return " ".join(text.split()).rstrip(".").strip()


def after_hashes(text: str) -> str:
    """GSM8K's answer: what follows ``####`` on its line; empty where there is none.

    >>> after_hashes("so 2 + 2 = 4\\n#### 4\\nNext")
    '4'
    """
    match = re.search(r"####\s*(.*)", text)
    return match[1].strip() if match else ""


def last_number(text: str) -> str:
    """The last number of a text; empty where there is none.

    >>> last_number("first 3, then 1,250.")
    '1,250'
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].rstrip(",") if found else ""


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return next((line for line in text.splitlines() if line.strip()), "")


def load_problems(path: str | Path) -> list[Problem]:
    """Problems of a JSONL file: ``{"prompt", "answer"}``, or GSM8K's layout.

    Raises:
      FileNotFoundError: No such file. ValueError: Other fields.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no task at {path}: the file does not exist")
    return [_problem(row, f"{path}:{i}") for i, row in enumerate(read_rows(path), 1)]


def _problem(row: dict, origin: str) -> Problem:
    if {"prompt", "answer"} <= set(row):
        return Problem(row["prompt"], str(row["answer"]))
    if {"question", "answer"} <= set(row) and "####" in row["answer"]:
        prompt = f"Question: {row['question']}\nAnswer:"
        return Problem(prompt, after_hashes(row["answer"]), f" {row['answer']}")
    raise ValueError(
        f"{origin} has the fields {sorted(row)}; expected prompt and answer, or "
        "question and answer with the result after ####"
    )


def exact_match(
    model: Model,
    tokenizer: Tokenizer,
    problems: Iterable[Problem] | str | Path,
    *,
    extract: Callable[[str], str] | None = None,
    shots: Sequence[Problem] = (),
    max_new_tokens: int = 128,
    stop: Sequence[str] = ("Question:",),
    task: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    progress: bool = True,
) -> Score:
    """Fraction of problems whose greedy answer equals the right one, both normalised.

    Args:
      problems: Problems, or a file that ``load_problems`` reads.
      extract: The answer within the written text; ``after_hashes`` by default for
        problems with a worked solution (GSM8K), else ``first_line``.
      shots: Solved problems that are put before each prompt.
      max_new_tokens, stop, batch_size: See ``generate``.
      limit: Problems to ask at most.

    Raises:
      ValueError: No problems, or what ``generate`` refuses.
    """
    if isinstance(problems, str | Path):
        task = Path(problems).stem if task is None else task
        problems = load_problems(problems)
    asked = list(itertools.islice(problems, limit))
    if not asked:
        raise ValueError("no problems to ask")
    if extract is None:
        extract = after_hashes if asked[0].solution is not None else first_line
    lead = "".join(f"{s.prompt}{s.solution or ' ' + s.answer}\n\n" for s in shots)
    right = []
    steps = range(0, len(asked), batch_size)
    for at in tqdm(steps, "exact match", delay=2, leave=False, disable=not progress):
        part = asked[at : at + batch_size]
        settings = dict(stop=stop, batch_size=batch_size)
        prompts = [lead + p.prompt for p in part]
        texts = generate(model, tokenizer, prompts, max_new_tokens, **settings)
        for problem, written in zip(part, texts, strict=True):
            right.append(normalise(extract(written.text)) == normalise(problem.answer))
    return Score.of(task or "exact match", {"exact": right})
