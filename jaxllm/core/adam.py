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
    """The value of the least loss so far; that loss, those at the start and the end."""

    value: Any
    least: Float[Array, ""]
    first: Float[Array, ""]
    last: Float[Array, ""]

    @classmethod
    def start(cls, value, loss) -> Best:
        return cls(value, loss, loss, loss)

    def or_this(self, value, loss) -> Best:
        """The better of the two; a diverged loss is no number and never wins."""
        keep: Any = functools.partial(jnp.where, loss < self.least)
        kept = jax.tree.map(keep, value, self.value)
        return Best(kept, keep(loss, self.least), self.first, loss)

    def errors(self) -> dict[str, Float[Array, ""]]:
        """The three losses under the names that events give them."""
        first, least, last = self.first, self.least, self.last
        return dict(error_before=first, error_after=least, error_last=last)

    def note(self, monitor: Monitor | None, step: str) -> None:
        """One event of the whole model; nothing where only shapes are known."""
        if monitor is None or traced(self.least):
            return
        losses = {name: float(loss) for name, loss in self.errors().items()}
        monitor.note(dict(step=step, path="model") | losses)
