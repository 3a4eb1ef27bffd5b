"""The report of a run, from its journal: report.json, report.md and a plot."""

from __future__ import annotations

import json
from typing import Any

from jaxllm.evaluate import Report, Speed, speed_up
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.plot import scatter
from jaxllm.evaluate.render import publish, table
from jaxllm.evaluate.report import JSON, MARKDOWN, PLOT
from jaxllm.experiment.folder import RunFolder


def write(folder: RunFolder, names: list[str]) -> None:
    """Write report.json, report.md and report.png: all of them, or none."""
    report = Report(collect(folder, names))
    text = json.dumps(report.data, indent=1, ensure_ascii=False) + "\n"
    publish(
        folder.path,
        {
            JSON: lambda path: path.write_text(text, encoding="utf-8"),
            MARKDOWN: lambda path: path.write_text(markdown(report), encoding="utf-8"),
            PLOT: lambda path: scatter(report.points, path),
        },
    )


def collect(folder: RunFolder, names: list[str]) -> dict[str, Any]:
    """All results of a run in the form of ``jaxllm.evaluate.Report``, and more."""
    steps: list[dict[str, Any]] = []
    for step, name in enumerate(names):
        found = dict(folder.find(step, "measured"))
        made = folder.find(step, "made") or {}
        cost = {k: made.get(k) for k in ("seconds", "disk", "blocks")}
        kept = {k: v for k, v in found.items() if k not in ("kind", "time", "step")}
        base = steps[0]["speed"] if steps else None
        faster = _faster(base, found["speed"])
        steps.append(kept | {"name": name, "speed_up": faster} | cost)
    samples = {r["name"]: r["text"] for r in folder.rows if r["kind"] == "sample"}
    (saved,) = [r for r in folder.rows if r["kind"] == "checkpoint"][-1:]
    return {
        "name": folder.config.name,
        "environment": environment(folder.config.seed),
        "steps": steps,
        "samples": samples,
        "checkpoint": {k: saved[k] for k in ("disk", "bit_equal")},
        "config": folder.config.data,
    }


def _faster(base: dict | None, timed: dict | None) -> str | None:
    if base is None or timed is None:
        return None
    return speed_up(Speed(**base), Speed(**timed))


def markdown(report: Report) -> str:
    """The page of ``Report``, then other texts, samples and the checkpoint."""
    data = report.data
    parts = [report.to_markdown().strip(), f"![size and perplexity]({PLOT})"]
    if len(data["steps"][0]["perplexity"]) > 1:
        parts += ["## All texts", _texts(data["steps"])]
    for name, text in data["samples"].items():
        parts += [f"## Sample of `{name}`", _fenced(text)]
    saved = data["checkpoint"]
    equal = "bit-equal" if saved["bit_equal"] else "DIFFERENT"
    where = f"`checkpoint/`: {saved['disk']:,} bytes on disk; restored logits {equal}."
    return "\n\n".join([*parts, "## Checkpoint", where]) + "\n"


def _texts(steps: list[dict[str, Any]]) -> str:
    """Perplexity of every step on every text, and the protocols."""
    texts = list(steps[0]["perplexity"])
    rows = [
        [f"`{s['name']}`", *(f"{s['perplexity'][t]['perplexity']:.4f}" for t in texts)]
        for s in steps
    ]
    lines = [
        f"* {text}: {found['protocol']}; {found['tokens']:,} tokens of "
        f"{found['corpus']} (digest {found['digest']})."
        for text, found in steps[0]["perplexity"].items()
    ]
    return "\n\n".join([table(["transform", *texts], rows), "\n".join(lines)])


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
