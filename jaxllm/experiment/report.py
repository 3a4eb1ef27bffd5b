"""The report of a run: report.json holds every number, report.md shows them."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoint.manifest import package_version
from jaxllm.experiment.folder import RunFolder, write_text

PLOT = "report.png"


def write(folder: RunFolder, names: list[str]) -> None:
    """Write report.json, report.md and the plot from the journal of a run."""
    data = collect(folder, names)
    write_text(folder.path / "report.json", json.dumps(data, indent=1) + "\n")
    plot({folder.config.name: data}, folder.path / PLOT)
    write_text(folder.path / "report.md", markdown(data))


def collect(folder: RunFolder, names: list[str]) -> dict[str, Any]:
    """All results of a run as JSON data."""
    steps = []
    for step, name in enumerate(names):
        measured = folder.find(step, "measured")
        made = folder.find(step, "made") or {}
        cost = {k: made.get(k) for k in ("seconds", "disk", "blocks")}
        kept = {k: v for k, v in measured.items() if k not in ("kind", "time")}
        steps.append(kept | {"name": name} | cost)
    samples = {r["name"]: r["text"] for r in folder.rows if r["kind"] == "sample"}
    (saved,) = [r for r in folder.rows if r["kind"] == "checkpoint"][-1:]
    return {
        "name": folder.config.name,
        "config": folder.config.data,
        "environment": environment(),
        "steps": steps,
        "samples": samples,
        "checkpoint": {k: saved[k] for k in ("disk", "bit_equal")},
    }


def environment() -> dict[str, Any]:
    """Device, versions and commit beside the numbers."""
    device = jax.devices()[0]
    return {
        "command": f"jaxllm run config.yaml  # {package_version()}",
        "commit": _commit(),
        "device": f"{device.device_kind} x {jax.device_count()} ({device.platform})",
        "machine": f"{platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxllm": package_version(),
    }


def _commit() -> str | None:
    """The commit of the source tree, where it is one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return found.stdout.strip() or None


def markdown(data: dict[str, Any]) -> str:
    """The report for people."""
    parts = [f"# {data['name']}", _results(data["steps"]), f"![plot]({PLOT})"]
    parts += ["## Protocols", _protocols(data["steps"][0])]
    parts += ["## Bytes on device by part", _parts(data["steps"])]
    for name, text in data["samples"].items():
        parts += [f"## Sample: {name}", _fenced(text)]
    saved = data["checkpoint"]
    equal = "bit-equal" if saved["bit_equal"] else "DIFFERENT"
    where = f"`checkpoint/`: {saved['disk']:,} bytes on disk; restored logits {equal}."
    parts += ["## Checkpoint", where, "## Environment", _pairs(data["environment"])]
    return "\n\n".join(parts) + "\n"


def _results(steps: list[dict[str, Any]]) -> str:
    texts = list(steps[0]["perplexity"])
    head = ["step", "bytes", "bits per weight", *texts, "on disk", "seconds"]
    rows = []
    for step in steps:
        scores = [f"{step['perplexity'][t]['perplexity']:.3f}" for t in texts]
        size = step["size"]
        bits = f"{size['bits_per_weight']:.3f}"
        cost = [_number(step["disk"], ","), _number(step["seconds"], ".1f")]
        rows.append([f"`{step['name']}`", f"{size['total']:,}", bits, *scores, *cost])
    return table(head, rows)


def _protocols(step: dict[str, Any]) -> str:
    return "\n".join(
        f"* {label}: {p['protocol']}; {p['tokens']:,} tokens of {p['corpus']} "
        f"(digest {p['digest']})"
        for label, p in step["perplexity"].items()
    )


def _parts(steps: list[dict[str, Any]]) -> str:
    parts = [p for p, n in steps[0]["size"]["bytes"].items() if n]
    rows = []
    for step in steps:
        held = step["size"]["bytes"]
        rows.append([f"`{step['name']}`", *(f"{held[p]:,}" for p in parts)])
    return table(["step", *parts], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    line = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([line(head), rule, *map(line, rows)])


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _pairs(values: dict[str, Any]) -> str:
    return "\n".join(f"* {k}: {v}" for k, v in values.items())


def _number(value, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity over bytes, one line of steps per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, data in runs.items():
        steps = [s for s in data["steps"] if s["perplexity"]]
        if not steps:
            continue
        sizes = [s["size"]["total"] / 1e6 for s in steps]
        scores = [next(iter(s["perplexity"].values()))["perplexity"] for s in steps]
        axes.plot(sizes, scores, "o-", label=name)
        for step, size, score in zip(steps, sizes, scores, strict=True):
            label = step["name"].partition("(")[0]
            axes.annotate(
                label, (size, score), xytext=(4, 4), textcoords="offset points"
            )
    axes.set_xlabel("bytes on device (MB)")
    axes.set_ylabel("perplexity per token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    figure.savefig(path, dpi=120)
