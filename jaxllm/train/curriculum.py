"""Batches that change with the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.core.batch import Batch


@dataclasses.dataclass(frozen=True)
class ShortFirst:
    """Rows cut into ``length`` tokens until step ``steps``, whole ones afterwards.

    Attention over short rows costs less, and early training hardly needs long ones
    (arXiv:2012.15832). Tokens of a step and data order stay the same: a batch
    [rows, n * length] becomes [rows * n, length].

    Raises:
      ValueError: length or steps out of range; when a batch is made, rows that do not
        split into whole parts.
    """

    batches: Any
    length: int
    steps: int

    def __post_init__(self):
        if self.length < 2 or self.steps < 0:
            raise ValueError(
                f"rows of {self.length} tokens until step {self.steps}, expected 2 or "
                "more tokens and 0 or more steps"
            )

    def batch(self, step: int) -> Batch:
        batch = self.batches.batch(step)
        if step >= self.steps:
            return batch
        whole = batch.tokens.shape[1]
        if whole % self.length:
            raise ValueError(
                f"rows of {whole} tokens do not split into rows of {self.length}"
            )
        return jax.tree.map(lambda x: x.reshape(-1, self.length), batch)
