"""Choosing among transforms by what they do to the whole model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.core.compose import Context
from jaxllm.core.model import Model
from jaxllm.core.spec import expression, marked


@expression
def best_of(*options):
    """The body that tries other bodies and keeps the one that moves the logits least.

    The loss is the mean squared difference of the logits on the calibration data.
    All options must give the same structure of weights; the choice is one for the
    whole selection, so it cannot be narrowed.
    """
    if not options:
        raise ValueError("best_of needs at least one option")

    def run(model: Model, context: Context) -> Model:
        batches = tuple(context.calibration)
        wanted = [_logits(model, batch) for batch in batches]
        best: Model | None = None
        least = jnp.asarray(jnp.inf)
        for i, option in enumerate(options):
            monitor = context.monitor
            monitor = None if monitor is None else monitor.scoped(str(i))
            made = option(model, dataclasses.replace(context, monitor=monitor))
            pairs = zip(batches, wanted, strict=True)
            loss = sum(_shift(made, batch, goal) for batch, goal in pairs)
            best = made if best is None else _either(loss < least, made, best)
            least = jnp.minimum(loss, least)
        assert best is not None  # there is at least one option
        return best

    return marked(run, whole=True)


def _either(first, one: Model, other: Model) -> Model:
    """``one`` where ``first`` (which may be traced) is true, else ``other``."""
    pick = lambda a, b: jnp.where(first, a, b)  # noqa: E731
    return other.replace(params=jax.tree.map(pick, one.params, other.params))


@jax.jit
def _logits(model: Model, batch):
    return model(batch.tokens, positions=batch.positions, segments=batch.segments)


@jax.jit
def _shift(model: Model, batch, goal):
    error = (_logits(model, batch) - goal).astype(jnp.float32) ** 2
    if batch.weights is None:
        return error.mean()
    return (error * batch.weights[..., None]).mean()
