"""Reports side by side: which steps are worth their bytes?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxllm.evaluate.plot import Point, pareto, scatter
from jaxllm.evaluate.render import first, publish, table
from jaxllm.evaluate.report import Report


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Steps of several reports; ``best`` marks the Pareto front."""

    points: tuple[Point, ...]
    best: tuple[bool, ...]
    protocol: str

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.points, self.best, strict=True)
        steps = [p._asdict() | {"best": b} for p, b in rows]
        return {"protocol": self.protocol, "steps": steps}

    def to_markdown(self) -> str:
        """All steps, smallest first, and which of them nothing else beats."""
        rows = [
            [
                p.run,
                f"`{p.name}`",
                f"{p.bytes:,}",
                f"{p.perplexity:.4f}",
                "*" if b else "",
            ]
            for p, b in sorted(
                zip(self.points, self.best, strict=True), key=lambda row: row[0].bytes
            )
        ]
        head = [
            "report",
            "transform",
            "bytes on device",
            "perplexity per token",
            "best",
        ]
        note = "`*`: no other step is at least as small and as good, and better in one."
        return (
            "\n\n".join(
                [table(head, rows, words=2), note, f"Protocol: {self.protocol}"]
            )
            + "\n"
        )

    def write(self, folder: str | Path) -> Path:
        """Write compare.json, compare.md and compare.png; all of them, or none."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        page = self.to_markdown() + "\n![size and perplexity](compare.png)\n"
        return publish(
            Path(folder),
            {
                "compare.json": lambda path: path.write_text(text, encoding="utf-8"),
                "compare.md": lambda path: path.write_text(page, encoding="utf-8"),
                "compare.png": lambda path: scatter(self.points, path),
            },
        )

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        return self.to_markdown()


def compare(*reports: Report | str | Path) -> Comparison:
    """Puts the steps of reports (or their folders) side by side.

    Raises:
      ValueError: None given, or perplexities of other texts or protocols, which say
        nothing about each other.
    """
    if not reports:
        raise ValueError("no reports to compare")
    read = [_named(r) for r in reports]
    seen: dict[str, str] = {}
    for one in read:
        for step in one.data["steps"]:
            nats = first(step)
            seen[f"{nats['protocol']} (text {nats['digest']})"] = one.data["name"]
    if len(seen) > 1:
        lines = "; ".join(f"{name}: {protocol}" for protocol, name in seen.items())
        raise ValueError(f"the reports measured different things: {lines}")
    points = tuple(p for one in read for p in one.points)
    return Comparison(points, pareto(points), next(iter(seen)))


def _named(source: Report | str | Path) -> Report:
    """A report under its own name, or its folder's."""
    if isinstance(source, Report):
        return source
    found = Report.load(source)
    return Report(found.data | {"name": Path(source).name or found.data["name"]})
