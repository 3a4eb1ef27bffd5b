"""Reports as Markdown, and files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(data: dict[str, Any]) -> str:
    """All results of a report with their protocol and surroundings."""
    steps = data["steps"]
    parts = [f"# {data['name']}", _results(steps), _notes(steps)]
    parts += ["Bytes on device by part:", _parts(steps)]
    return "\n\n".join([*parts, _surroundings(data["environment"])]) + "\n"


def first(step: dict[str, Any]) -> dict[str, Any]:
    """The perplexity that stands for a step."""
    if not step["perplexity"]:
        raise ValueError(f"step {step['name']!r} has no perplexity")
    return next(iter(step["perplexity"].values()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; all columns but the first ``words`` hold numbers.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    line = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return "\n".join([line(head), rule, *map(line, rows)])


def _results(steps: Sequence[dict[str, Any]]) -> str:
    """One row a step; a column that no step fills is left out."""
    cells = [_cells(step) for step in steps]
    names = [n for n in cells[0] if any(row[n] for row in cells)]
    rows = (
        [f"`{s['name']}`", *(row[n] for n in names)]
        for s, row in zip(steps, cells, strict=True)
    )
    return table(["transform", *names], rows)


def _cells(step: dict[str, Any]) -> dict[str, str]:
    held, nats, timed = step["size"], first(step), step["speed"] or {}
    show = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
    scores = {
        f"{s['task']} ({k})": f"{v:.4f}"
        for s in step["scores"]
        for k, v in s["accuracy"].items()
    }
    return {
        "perplexity per token": show(nats["perplexity"], ".4f"),
        "bits per byte": show(nats["bits_per_byte"], ".4f"),
        "per word": show(nats["word_perplexity"], ".2f"),
        **scores,
        "bytes on device": show(held["total"], ","),
        "bytes on disk": show(step["disk"], ","),
        "bits per weight, linear": show(held["bits_per_weight"], ".3f"),
        "bits per weight, whole model": show(held["bits_per_parameter"], ".3f"),
        "KV bytes per token": show(step["cache_bytes_per_token"], ",.0f"),
        "prefill tok/s": show(timed.get("prefill"), ",.0f"),
        "decode tok/s": show(timed.get("decode"), ",.0f"),
        "joules per token": show(timed.get("joules_per_token"), ".3g"),
        "seconds": show(step["seconds"], ".1f"),
    }


def _notes(steps: Sequence[dict[str, Any]]) -> str:
    """Protocol, denominators, and speed in words."""
    nats, notes = first(steps[0]), []
    notes.append(
        f"* Perplexity: {nats['protocol']}; {nats['tokens']:,} tokens of "
        f"{nats['corpus']} (digest {nats['digest']})."
    )
    notes.append(
        "* Bits per weight, linear: measured bytes of the compressed linear maps (of "
        "all of them where none is compressed) over their logical entries; whole "
        "model: all measured bytes over all logical entries."
    )
    timed = steps[0]["speed"]
    if timed:
        notes.append(
            f"* Speed: batch {timed['batch']}, {timed['prompt_tokens']} prompt and "
            f"{timed['new_tokens']} new tokens, median of {timed['repeats']} after a "
            f"warm-up, on {timed['device']}. Energy: {timed['energy_source']}."
        )
    notes += [f"* `{s['name']}`: {s['speed_up']}" for s in steps if s["speed_up"]]
    for step in steps:
        plain = (step["speed"] or {}).get("plain", {})
        reasons = [f"{op} ({'; '.join(why)})" for op, why in plain.items()]
        if reasons:
            notes.append(f"* `{step['name']}`: no kernel for {', '.join(reasons)}")
    return "\n".join(notes)


def _parts(steps: Sequence[dict[str, Any]]) -> str:
    parts = [
        p
        for p in steps[0]["size"]["bytes"]
        if any(s["size"]["bytes"][p] for s in steps)
    ]
    rows = (
        [f"`{s['name']}`", *(f"{s['size']['bytes'][p]:,}" for p in parts)]
        for s in steps
    )
    return table(["transform", *parts], rows)


def _surroundings(found: dict[str, Any]) -> str:
    versions = found["versions"]
    shown = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    lines = {**found, "versions": shown}
    return "\n".join(f"* {k}: {v}" for k, v in lines.items() if v is not None)


def rewrite(path: Path, text: str) -> None:
    """A text file whose new text appears whole or not at all."""
    publish(
        path.parent, {path.name: lambda part: part.write_text(text, encoding="utf-8")}
    )


def publish(folder: Path, files: dict[str, Callable[[Path], object]]) -> Path:
    """Write all files under temporary names, then rename them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.part" for name in files}
    try:
        for name, write in files.items():
            write(parts[name])
        for name, part in parts.items():
            os.replace(part, folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return folder
