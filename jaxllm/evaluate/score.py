"""Accuracies with their standard errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """Fractions of right answers, by the rule that chose the answer.

    Attributes:
      task: What was asked.
      count: Number of items.
      accuracy: Fraction right, by rule.
      stderr: Standard error of that mean, by rule.
      extra: Other figures of the task.
    """

    task: str
    count: int
    accuracy: dict[str, float]
    stderr: dict[str, float]
    extra: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, task: str, right: Mapping[str, Sequence[bool]], **extra: float
    ) -> Score:
        """From one truth value per item and rule.

        >>> print(Score.of("task", {"sum": [True, True, False, True]}))
        task: 0.7500 +- 0.2500 (sum), 4 items
        """
        counts = {len(v) for v in right.values()}
        (count,) = counts
        accuracy = {k: sum(v) / count for k, v in right.items()}
        error = {
            k: math.sqrt(p * (1 - p) / max(count - 1, 1)) for k, p in accuracy.items()
        }
        return cls(task, count, accuracy, error, dict(extra))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = [
            f"{v:.4f} +- {self.stderr[k]:.4f} ({k})" for k, v in self.accuracy.items()
        ]
        parts += [f"{k} {v:.4g}" for k, v in self.extra.items()]
        return f"{self.task}: {', '.join(parts)}, {self.count} items"
