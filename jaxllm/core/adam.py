"""Descent as all learning shares it: Adam's updates, and the best that was seen."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxllm.core.arrays import traced
from jaxllm.core.walk import Monitor


def adam_state(theta) -> Any:
    """Adam's moments of parameters that have not moved."""
    return optax.scale_by_adam().init(theta)


def adam_updates(slopes, state) -> tuple[Any, Any]:
    """What to subtract, times a rate, from the parameters, and the new moments."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
        return optax.scale_by_adam().update(slopes, state)


class Best(NamedTuple):
    """The value of the least loss so far, that loss, and the loss at the start."""

    value: Any
    least: Float[Array, ""]
    first: Float[Array, ""]

    @classmethod
    def start(cls, value, loss) -> Best:
        return cls(value, loss, loss)

    def or_this(self, value, loss) -> Best:
        """The better of the two; a diverged loss is no number and never wins."""
        keep: Any = functools.partial(jnp.where, loss < self.least)
        kept = jax.tree.map(keep, value, self.value)
        return Best(kept, keep(loss, self.least), self.first)

    def note(self, monitor: Monitor | None, step: str) -> None:
        """One event of the whole model; nothing where only shapes are known."""
        if monitor is None or traced(self.least):
            return
        losses = dict(error_before=float(self.first), error_after=float(self.least))
        monitor.events.append(dict(step=step, path="model") | losses)
