"""Sparsity patterns: which weights of a block may stay, as sets to project on."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.core.weights import Sparse


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Keep the best weights: ``kept`` of every ``block`` inputs, or a share of them.

    ``block`` is the number of inputs that compete for each output (None: all);
    ``joint`` lets the outputs of a block compete too (one total per block). A whole
    ``density`` may be given instead of a count.
    """

    density: float
    block: int | None = None
    joint: bool = False

    filling = -1.0  # importance of inputs that only fill a short last block

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density}; accepted: 0 < density <= 1")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block {self.block}; accepted: None or at least 1")

    @property
    def structured(self) -> bool:
        return self.block is not None and not self.joint

    def check(self, count: int) -> None:
        """Raise when ``count`` inputs do not divide into N:M blocks."""
        if self.structured and self.block and count % self.block:
            raise ValueError(
                f"{count} inputs do not divide into blocks of {self.block} ({self})"
            )

    def kept(self, count: int, out: int) -> int:
        """Weights that stay of ``count`` inputs: per output, or in all when joint."""
        block = min(self.block or count, count)
        sizes = [min(block, count - i) for i in range(0, count, block)]
        return sum(self._keep(n * (out if self.joint else 1)) for n in sizes)

    def _keep(self, competitors: int) -> int:
        return max(1, int(competitors * self.density + 0.5))

    def fit(self, block: Float[Array, "n out"], importance, support=None):
        """The mask [n, out] of weights to keep: largest |w| sqrt(importance).

        Inputs of negative importance do not exist (filling of a short last block).
        """
        score = jnp.abs(block) * jnp.sqrt(jnp.maximum(importance, 0))[:, None]
        real = importance >= 0
        score = jnp.where(real[:, None], score, -1.0)
        if support is not None:
            score = jnp.where(support, score, jnp.minimum(score, -0.5))
        lines = score.reshape(-1, 1) if self.joint else score
        rank = jnp.argsort(jnp.argsort(-lines, axis=0, stable=True), axis=0)
        rivals = block.shape[1] if self.joint else 1
        keep = [self._keep(n * rivals) for n in range(len(block) + 1)]
        return (rank < jnp.asarray(keep)[real.sum()]).reshape(block.shape)

    def snap(self, values, mask):
        return jnp.where(mask, values, 0.0)

    def pack(
        self, values: Float[Array, "in out"], mask: Bool[Array, "..."], dtype
    ) -> Sparse:
        """The stored weight of values that are zero outside the mask [in, out]."""
        count, out = values.shape
        name = str(self) if self.structured else ("mask" if self.joint else "row")
        return Sparse.of(values.astype(dtype), mask, self.kept(count, out), name)

    def __str__(self) -> str:
        if self.structured and self.block:
            return f"{self._keep(self.block)}:{self.block}"
        return f"{self.density:g}"


def parse_pattern(
    pattern: str | float, block: int | None = None, joint=False
) -> Pattern:
    """``"2:4"`` keeps 2 of every 4 inputs; a number is the share that is *removed*."""
    if isinstance(pattern, str):
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        if not found or not 0 < int(found[1]) <= int(found[2]):
            raise ValueError(
                f"pattern {pattern!r}; accepted: 'N:M' or a sparsity in 0..1"
            )
        kept, size = int(found[1]), int(found[2])
        return Pattern(kept / size, size)
    if not 0 <= pattern < 1:
        raise ValueError(f"sparsity {pattern}; accepted: 0 <= sparsity < 1, or 'N:M'")
    return Pattern(1 - pattern, block, joint)
