"""What a run measures of a model, as JSON data."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.core.model import Model
from jaxllm.core.spec import encode
from jaxllm.evaluate import (
    Score,
    cache_bytes_per_token,
    choose,
    exact_match,
    perplexity,
    size,
    speed,
)
from jaxllm.experiment.prepare import Prepared
from jaxllm.experiment.schema import TaskConfig
from jaxllm.generation import generate


def measure(model: Model, prepared: Prepared, progress: bool = True) -> dict[str, Any]:
    """Size, perplexities, task scores and speed: a step of ``evaluate.Report``."""
    evaluate = prepared.config.evaluate
    return {
        "specs": [encode(spec) for spec in model.history.specs],
        "size": size(model).to_json(),
        "perplexity": _perplexities(model, prepared, progress),
        "scores": [
            _score(model, prepared, task, progress).to_json() for task in evaluate.tasks
        ],
        "speed": speed(model).to_json() if evaluate.speed else None,
        "cache_bytes_per_token": cache_bytes_per_token(model),
    }


def _perplexities(model: Model, prepared: Prepared, progress: bool) -> dict[str, Any]:
    found = {}
    configs = prepared.config.evaluate.perplexity
    for config, corpus in zip(configs, prepared.corpora, strict=True):
        values = dataclasses.asdict(config)
        del values["texts"], values["split"]
        result = perplexity(
            model, prepared.tokenizer, corpus, **values, progress=progress
        )
        found[config.label] = result.to_json()
    return found


def _score(model: Model, prepared: Prepared, task: TaskConfig, progress) -> Score:
    run = choose if task.kind == "choice" else exact_match
    values = dict(task=task.label, limit=task.limit, progress=progress)
    return run(model, prepared.tokenizer, task.path, **values)


def sample(model: Model, prepared: Prepared) -> str:
    """The configured sample, prompt included."""
    values = dataclasses.asdict(prepared.config.generate)
    prompt = values.pop("prompt")
    (made,) = generate(model, prepared.tokenizer, [prompt], **values)
    return prompt + made.text


def headline(found: dict[str, Any]) -> str:
    """One line for the terminal."""
    texts = [f"{k}: {v['perplexity']:.3f}" for k, v in found["perplexity"].items()]
    texts = [f"perplexity of {t}" for t in texts]
    measured = found["size"]
    bits = f"{measured['bits_per_weight']:.2f} bits per weight"
    return "; ".join([f"{measured['total']:,} bytes ({bits})", *texts])
