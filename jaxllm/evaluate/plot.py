"""Size against perplexity: points, their Pareto front, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple


class Point(NamedTuple):
    """One measured model."""

    run: str
    name: str
    bytes: int
    perplexity: float


def pareto(points: Sequence[Point]) -> tuple[bool, ...]:
    """Which points no other one beats: at least as small and good, better in one.

    >>> pareto([Point("a", "x", 9, 2), Point("a", "y", 4, 3), Point("a", "z", 5, 3)])
    (True, True, False)
    """

    def beaten(p: Point) -> bool:
        mine = p.bytes, p.perplexity
        return any(
            q.bytes <= p.bytes
            and q.perplexity <= p.perplexity
            and (q.bytes, q.perplexity) != mine
            for q in points
        )

    return tuple(not beaten(p) for p in points)


def scatter(points: Sequence[Point], path: Path) -> None:
    """A PNG of perplexity over bytes: a colour for each run, the front as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = sorted(
        (p.bytes / 1e6, p.perplexity)
        for p, best in zip(points, pareto(points), strict=True)
        if best
    )
    axes.plot(*zip(*front, strict=True), ":", color="0.6", label="best for its size")
    for run, group in groupby(points, lambda p: p.run):
        members = list(group)
        sizes, scores = (
            [p.bytes / 1e6 for p in members],
            [p.perplexity for p in members],
        )
        axes.plot(sizes, scores, "o", label=run)
        for point, x, y in zip(members, sizes, scores, strict=True):
            offset = dict(xytext=(5, 5), textcoords="offset points", fontsize=8)
            axes.annotate(short(point.name), (x, y), **offset)
    values = [p.perplexity for p in points]
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
    axes.margins(0.15)
    axes.set_xlabel("bytes on device (MB)")
    axes.set_ylabel("perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def short(name: str, most: int = 40) -> str:
    """A spec that fits beside a point.

    >>> short("gptq(bits=3)"), short("a" * 50)[-4:]
    ('gptq(bits=3)', 'aaa…')
    """
    return name if len(name) <= most else name[: most - 1] + "…"
