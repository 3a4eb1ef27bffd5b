"""The report: what each step of a compression cost, and what it bought.

A report is JSON data (every number with its protocol, command, commit, device and
versions) that renders as a table. It measures models that are already there::

    report(model, small, text)                    # in a notebook: a table
    report(model, [a, b], text).write("runs/x")   # report.json, report.md, report.png
    compare("runs/x", "runs/y")                   # which steps are worth their bytes
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.core.model import Model
from jaxllm.core.spec import encode
from jaxllm.data.corpora import Corpus
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.evaluate.efficiency import (
    Speed,
    cache_bytes_per_token,
    disk_bytes,
    size,
    speed_up,
)
from jaxllm.evaluate.efficiency import speed as measure_speed
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.perplexity import as_corpus, perplexity
from jaxllm.evaluate.plot import Point, scatter
from jaxllm.evaluate.render import first, markdown, publish
from jaxllm.evaluate.score import Score

JSON, MARKDOWN, PLOT = "report.json", "report.md", "report.png"


@dataclasses.dataclass(frozen=True)
class Report:
    """Measurements of models step by step, as JSON data that renders as a table."""

    data: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what ``write`` wrote.

        Raises:
          FileNotFoundError: No report there. ValueError: Not a report.
        """
        path = Path(folder)
        path = path / JSON if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no report at {path}")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not data.get("steps"):
            raise ValueError(f"{path} is not a report: it has no steps")
        return cls(data)

    @property
    def points(self) -> list[Point]:
        """Size against perplexity of each step."""
        name = self.data["name"]
        return [
            Point(name, step["name"], step["size"]["total"], first(step)["perplexity"])
            for step in self.data["steps"]
        ]

    def to_json(self) -> dict[str, Any]:
        return self.data

    def to_markdown(self) -> str:
        """All results with their protocol and surroundings."""
        return markdown(self.data)

    def write(self, folder: str | Path) -> Path:
        """Write report.json, report.md and report.png; all of them, or none."""
        text = json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"
        page = self.to_markdown() + f"\n![size and perplexity]({PLOT})\n"
        return publish(
            Path(folder),
            {
                JSON: lambda path: path.write_text(text, encoding="utf-8"),
                MARKDOWN: lambda path: path.write_text(page, encoding="utf-8"),
                PLOT: lambda path: scatter(self.points, path),
            },
        )

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        return self.to_markdown()


def report(
    before: Model,
    after: Model | Sequence[Model],
    texts: str | Iterable[str] | Corpus | Any,
    *,
    tokenizer: Tokenizer | None = None,
    protocol: str = "windows",
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    speed: bool = True,
    seconds: Sequence[float | None] | None = None,
    folders: Sequence[str | Path | None] | None = None,
    score: Callable[[Model], Sequence[Score]] | None = None,
    seed: int | None = None,
    name: str = "report",
    progress: bool = True,
) -> Report:
    """Measures a model before and after its transforms.

    Args:
      before, after: The model, and what was made of it: one model or several in order.
      texts: A corpus, documents or one string; or token ids where no tokenizer exists.
      tokenizer: The model's; the built-in one where it fits the vocabulary exactly.
      protocol, window, stride, limit, batch_size: See ``perplexity``.
      speed: Also time generation on this device.
      seconds: Wall time of making each model of ``after``.
      folders: Where each model of ``after`` is saved; its bytes on disk are reported.
      score: Task scores of a model: ``lambda m: [choose(m, tokenizer, questions)]``.
      seed: Of the transforms, for the record.

    Raises:
      ValueError: What ``perplexity`` refuses, or lists of other lengths than ``after``.
      FileNotFoundError: A folder does not exist.
    """
    made = [after] if isinstance(after, Model) else list(after)
    seconds = _aligned("seconds", seconds, made)
    disk = [f and disk_bytes(f) for f in _aligned("folders", folders, made)]
    source = _source(before, tokenizer, texts)
    values = dict(window=window, stride=stride, limit=limit, batch_size=batch_size)
    steps, base = [], None
    for number, model in enumerate([before, *made]):
        nats = perplexity(model, *source, protocol, **values, progress=progress)
        timed = measure_speed(model) if speed else None
        step = _step(model, nats.to_json(), timed, base)
        step["name"] = _name(model, ([before, *made])[number - 1] if number else None)
        step["seconds"] = seconds[number - 1] if number else None
        step["disk"] = disk[number - 1] if number else None
        step["scores"] = [s.to_json() for s in score(model)] if score else []
        steps.append(step)
        base = timed if base is None else base
    return Report({"name": name, "environment": environment(seed), "steps": steps})


def _step(model: Model, nats: dict, timed: Speed | None, base: Speed | None) -> dict:
    faster = None if timed is None or base is None else speed_up(base, timed)
    return {
        "specs": [encode(spec) for spec in model.history.specs],
        "size": size(model).to_json(),
        "perplexity": {nats["corpus"]: nats},
        "speed": None if timed is None else timed.to_json(),
        "speed_up": faster,
        "cache_bytes_per_token": cache_bytes_per_token(model),
    }


def _aligned(name: str, values: Sequence | None, made: Sequence[Model]) -> list:
    values = [None] * len(made) if values is None else list(values)
    if len(values) != len(made):
        raise ValueError(f"{len(values)} {name} for {len(made)} models, expected equal")
    return values


def _source(model: Model, tokenizer: Tokenizer | None, texts) -> tuple[Any, Any]:
    """The two arguments of ``perplexity`` that say what is read."""
    if isinstance(texts, str | Corpus) or tokenizer is not None:
        return tokenizer or _builtin(model), as_corpus(texts)
    texts = list(texts)
    if any(isinstance(text, str) for text in texts):
        return _builtin(model), as_corpus(texts)
    return texts, None


def _builtin(model: Model) -> Tokenizer:
    found = load_tokenizer("builtin:tiny")
    if found.vocab_size != model.config.vocab_size:
        raise ValueError(
            "text needs the model's tokenizer: pass tokenizer=... (the built-in has "
            f"{found.vocab_size} ids, the model {model.config.vocab_size})"
        )
    return found


def _name(model: Model, previous: Model | None) -> str:
    """The specs since the previous step, or all of them."""
    specs = model.history.specs
    earlier = () if previous is None else previous.history.specs
    if earlier and len(specs) > len(earlier) and specs[: len(earlier)] == earlier:
        return "+ " + " -> ".join(map(repr, specs[len(earlier) :]))
    return " -> ".join(map(repr, specs)) or "dense"
