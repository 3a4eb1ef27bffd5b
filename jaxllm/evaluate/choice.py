"""Multiple choice by log-likelihood: which continuation does the model prefer?

An item is a set of (context, continuation) pairs. The choice is the pair whose
continuation has the largest log-likelihood, summed, per byte, or per token.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from jaxllm.core.model import Model
from jaxllm.data.corpora import read_rows
from jaxllm.data.packing import Rows
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary
from jaxllm.evaluate.likelihood import likelihood_and_greedy, padded
from jaxllm.evaluate.score import Score
from jaxllm.generation.loop import bucket

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """Pairs of context and continuation, of which ``answer`` is the right one.

    A question of one pair asks whether the model would write that continuation.
    """

    pairs: tuple[Pair, ...]
    answer: int = 0

    def __post_init__(self):
        if not self.pairs or any(not continuation for _, continuation in self.pairs):
            raise ValueError(f"a question needs non-empty choices, got {self.pairs!r}")
        if not 0 <= self.answer < len(self.pairs):
            last = len(self.pairs) - 1
            raise ValueError(f"answer is {self.answer}, expected 0 to {last}")


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of one continuation, its length, and whether it is greedy."""

    logprob: float
    tokens: int
    greedy: bool


def choose(
    model: Model,
    tokenizer: Tokenizer,
    questions: Iterable[Question] | str | Path,
    *,
    task: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    progress: bool = True,
) -> Score:
    """Accuracy on multiple-choice questions.

    Args:
      model, tokenizer: A model and its tokenizer.
      questions: Questions, or a file that ``load_questions`` reads.
      task: Name in the score; the file's by default.
      batch_size: Rows of a batch.
      limit: Questions to ask at most.

    Returns:
      A score with the rules ``sum`` (largest log-likelihood), ``bytes`` and ``tokens``
      (largest per UTF-8 byte or token of the continuation). Where questions have a
      single pair (a last word to predict) the rule is ``greedy`` and ``perplexity`` of
      the continuation is an extra figure.

    Raises:
      ValueError: No questions, or both kinds mixed.
    """
    if isinstance(questions, str | Path):
        task = Path(questions).stem if task is None else task
        questions = load_questions(questions)
    asked = list(itertools.islice(questions, limit))
    if not asked:
        raise ValueError("no questions to ask")
    single = {len(q.pairs) == 1 for q in asked}
    if len(single) > 1:
        raise ValueError("questions with one choice and with several are mixed")
    pairs = [pair for q in asked for pair in q.pairs]
    scored = iter(loglikelihoods(model, tokenizer, pairs, batch_size, progress))
    found = [[next(scored) for _ in q.pairs] for q in asked]
    return (_greedy if single == {True} else _preferred)(task or "choice", asked, found)


def _greedy(task: str, asked: Sequence[Question], found) -> Score:
    nats = -np.mean([f.logprob for (f,) in found])
    right = [f.greedy for (f,) in found]
    return Score.of(task, {"greedy": right}, perplexity=math.exp(min(nats, 700)))


def _preferred(task: str, asked: Sequence[Question], found) -> Score:
    right: dict[str, list[bool]] = {"sum": [], "bytes": [], "tokens": []}
    for question, likelihoods in zip(asked, found, strict=True):
        sums = np.array([f.logprob for f in likelihoods])
        octets = np.array([len(text.encode()) for _, text in question.pairs])
        tokens = np.array([f.tokens for f in likelihoods])
        for rule, size in (("sum", 1), ("bytes", octets), ("tokens", tokens)):
            right[rule].append(int(np.argmax(sums / size)) == question.answer)
    return Score.of(task, right)


def loglikelihoods(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    batch_size: int = 16,
    progress: bool = True,
) -> list[Likelihood]:
    """Log-likelihood of each continuation after its context.

    Contexts longer than the model lose their beginning. Rows are sorted by length and
    padded to few lengths, each of which compiles once.

    Raises:
      ValueError: A continuation without tokens, or as long as the model.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    return score_tokens(model, encoded, batch_size, progress)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation.

    As lm-evaluation-harness does: spaces at the end of the context go to the
    continuation, where tokenizers want them, and the continuation's ids are what the
    ids of both together have beyond the context's. An empty context is BOS, or EOS.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = tokenizer.encode(continuation, bos=False)
        return ([] if start is None else [start]), ids
    before = tokenizer.encode(kept)
    return before, tokenizer.encode(kept + continuation)[len(before) :]


def score_tokens(
    model: Model,
    encoded: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 16,
    progress: bool = True,
) -> list[Likelihood]:
    """``loglikelihoods`` of token ids (context, continuation)."""
    longest = model.config.max_length
    for number, (context, continuation) in enumerate(encoded):
        if not continuation or len(continuation) >= longest + bool(not context):
            raise ValueError(
                f"continuation {number} has {len(continuation)} tokens, expected 1 to "
                f"{longest - 1} (the model's maximum length is {longest})"
            )
    rows = [([*a, *b][-longest:], len(b)) for a, b in encoded]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    groups = itertools.groupby(order, lambda i: bucket(len(rows[i][0]), longest))
    batches = [b for width, g in groups for b in _batches(width, list(g), batch_size)]
    found: dict[int, Likelihood] = {}
    for width, members in tqdm(
        batches, "log-likelihood", delay=2, leave=False, disable=not progress
    ):
        made = padded(_rows([rows[i] for i in members], width), batch_size)
        nats, greedy = map(np.asarray, likelihood_and_greedy(model, made))
        for i, value, best in zip(members, nats, greedy, strict=False):
            found[i] = Likelihood(-float(value), len(encoded[i][1]), bool(best))
    return [found[i] for i in range(len(rows))]


def _batches(width: int, members: list[int], size: int):
    return [(width, members[i : i + size]) for i in range(0, len(members), size)]


def _rows(rows: Sequence[tuple[list[int], int]], width: int) -> Rows:
    """Right-padded rows whose last ``count`` tokens are predicted."""
    tokens, weights = (np.zeros((len(rows), width), t) for t in (np.int32, np.float32))
    segments = np.zeros_like(tokens)
    for i, (ids, count) in enumerate(rows):
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
        weights[i, len(ids) - count : len(ids)] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    return Rows(tokens, segments, positions, weights)


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a file; the layout is recognised by its fields.

    ``{"context", "choices", "answer"}`` a line (a choice continues the context as it
    stands, ``answer`` counts from 0); HellaSwag; BLiMP pairs; LAMBADA (``{"text"}``:
    predict the last word); and the instruction form of ARC, PIQA, OpenBookQA and
    WinoGrande (a JSON list with ``instruction`` and ``answer``).

    Raises:
      FileNotFoundError: No such file. ValueError: Another layout (its fields named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no task at {path}: the file does not exist")
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = list(read_rows(path))
    made = []
    for number, row in enumerate(rows, 1):
        layout = next((f for names, f in LAYOUTS if names <= set(row)), None)
        if layout is None:
            known = "; ".join(", ".join(sorted(names)) for names, _ in LAYOUTS)
            raise ValueError(
                f"{path} item {number} has the fields {sorted(row)}; known: {known}"
            )
        made.append(layout(row))
    return made


def _plain(row: dict) -> Question:
    pairs = tuple((row["context"], choice) for choice in row["choices"])
    return Question(pairs, row["answer"])


def _hellaswag(row: dict) -> Question:
    """The preprocessing of lm-evaluation-harness (WikiHow's brackets taken out)."""

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    begin = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    pairs = tuple((clean(begin), f" {clean(ending)}") for ending in row["endings"])
    return Question(pairs, int(row["label"]))


def _blimp(row: dict) -> Question:
    return Question((("", row["sentence_good"]), ("", row["sentence_bad"])), 0)


def _lambada(row: dict) -> Question:
    before, _, word = row["text"].rstrip().rpartition(" ")
    return Question(((before, f" {word}"),))


_OPTION = r"(?:Answer|Solution|Option|Ending)"
_INSTRUCTION = re.compile(
    rf"[^:]*: (?P<ask>.*?)\s*(?P<options>{_OPTION}1: .*?)\s*{_OPTION} format: ",
    re.DOTALL,
)


def _instruction(row: dict) -> Question:
    """Options as continuations; of a sentence with a blank, what follows the blank."""
    match = _INSTRUCTION.match(row["instruction"])
    if match is None:
        raise ValueError(f"not the instruction form: {row['instruction'][:80]!r} ...")
    ask, (_, *options) = match["ask"], re.split(rf"\s*{_OPTION}\d: ", match["options"])
    answer = int(re.search(r"\d+$", row["answer"])[0]) - 1
    if "fill in the blank" in row["instruction"]:
        before, _, after = ask.partition("_")
        return Question(tuple((before + o, after) for o in options), answer)
    context = f"Question: {ask}\nAnswer:"
    return Question(tuple((context, f" {o}") for o in options), answer)


LAYOUTS: tuple[tuple[set[str], Callable[[dict], Question]], ...] = (
    ({"context", "choices", "answer"}, _plain),
    ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}, _hellaswag),
    ({"sentence_good", "sentence_bad"}, _blimp),
    ({"instruction", "answer"}, _instruction),
    ({"text"}, _lambada),
)
