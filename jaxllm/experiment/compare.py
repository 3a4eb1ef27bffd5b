"""After the runs: several side by side, and a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jaxllm import checkpoint
from jaxllm.core import weights
from jaxllm.core.model import Model
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.experiment import report
from jaxllm.models import hub


def compare(runs: list[Path], plot: Path) -> str:
    """A table of all steps of the runs, and a plot of perplexity over bytes.

    A step is marked ``*`` when no other is both smaller and better (the Pareto
    front); only equal protocols and texts are compared.

    Raises:
      FileNotFoundError: A run without a report.
      ValueError: Runs that measured other texts or protocols, or none.
    """
    data = {run.name or str(run): _read(run) for run in runs}
    points = [
        (name, step["name"], step["size"]["total"], _score(step))
        for name, found in data.items()
        for step in found["steps"]
    ]
    _check_protocols(data)
    rows = []
    for name, step, size, score in points:
        best = not any(s < size and p <= score for _, _, s, p in points)
        rows.append(
            [name, f"`{step}`", f"{size:,}", f"{score:.3f}", "*" if best else ""]
        )
    report.plot(data, plot)
    return report.table(["run", "step", "bytes", "perplexity", "best"], rows)


def _read(run: Path) -> dict[str, Any]:
    file = run / "report.json"
    if not file.is_file():
        raise FileNotFoundError(f"no report in {run}: it is not a finished run")
    return json.loads(file.read_text(encoding="utf-8"))


def _first(step: dict[str, Any]) -> dict[str, Any]:
    if not step["perplexity"]:
        raise ValueError(f"{step['name']} has no perplexity to compare")
    return next(iter(step["perplexity"].values()))


def _score(step: dict[str, Any]) -> float:
    return _first(step)["perplexity"]


def _check_protocols(data: dict[str, dict[str, Any]]) -> None:
    """Perplexities of other texts or protocols say nothing about each other."""
    seen: dict[tuple[str, str], str] = {}
    for name, found in data.items():
        first = _first(found["steps"][0])
        seen.setdefault((first["protocol"], first["digest"]), name)
    if len(seen) > 1:
        lines = "; ".join(f"{n}: {p} (text {d})" for (p, d), n in seen.items())
        raise ValueError(f"the runs measured different things: {lines}")


def export(uri: str, folder: str, dense: bool = False) -> None:
    """Write the model saved at ``uri`` as a Hugging Face folder, tokenizer included.

    Raises:
      TypeError: A weight is compressed and ``dense`` is false.
    """
    model = checkpoint.restore(uri)
    tokenizer = checkpoint.restore_tokenizer(uri, load_tokenizer)
    hub.save_pretrained(expanded(model) if dense else model, folder, tokenizer)


def expanded(model: Model) -> Model:
    """The same function with every weight as a dense array."""
    is_weight = lambda node: isinstance(node, weights.Weight)  # noqa: E731
    params = jax.tree.map(weights.materialize, model.params, is_leaf=is_weight)
    return model.replace(params=params)
