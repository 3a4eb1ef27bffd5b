"""What a run measures of a model, as JSON data."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.core.model import Model
from jaxllm.evaluate import perplexity, size
from jaxllm.experiment.prepare import Prepared
from jaxllm.generate import generate


def measure(model: Model, prepared: Prepared, progress: bool = True) -> dict[str, Any]:
    """Size, perplexities, task scores and speed of one model."""
    evaluate = prepared.config.evaluate
    found: dict[str, Any] = {"size": size(model).to_json(), "perplexity": {}}
    for config, corpus in zip(evaluate.perplexity, prepared.corpora, strict=True):
        values = dataclasses.asdict(config)
        del values["texts"], values["split"]
        result = perplexity(
            model, prepared.tokenizer, corpus, **values, progress=progress
        )
        found["perplexity"][config.label] = result.to_json()
    return found


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
