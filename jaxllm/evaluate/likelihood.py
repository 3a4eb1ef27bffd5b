"""Likelihood of given tokens, the one computation behind perplexity and choice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.core.batch import Batch
from jaxllm.core.model import Model
from jaxllm.data.packing import Rows


def likelihood_and_greedy(
    model: Model, batch: Batch
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Summed nats of each row, every token weighted by ``batch.weights``; and whether
    all weighted tokens are the likeliest ones, as greedy decoding would write them.

    For calls outside jit: equal blocks share a program, however deep the model is.
    """
    hidden = model.config.forward(
        model.params,
        batch.tokens,
        positions=batch.positions,
        segments=batch.segments,
        hidden_only=True,
        stepwise=True,
    )
    rest = {name: p for name, p in model.params.items() if name != "layers"}
    return _scores(model.replace(params=rest), hidden, batch)


def negative_log_likelihood(model: Model, batch: Batch) -> Float[Array, " rows"]:
    """Summed nats of each row, every token weighted by ``batch.weights``."""
    return likelihood_and_greedy(model, batch)[0]


@jax.jit
def _scores(model: Model, hidden, batch: Batch):
    """The head is applied row by row: [length, vocabulary] logits exist at a time."""

    def row(parts):
        states, tokens, weights = parts
        logits = model.config.head(model.params, states[None, :-1])[0]
        target = jnp.take_along_axis(logits, tokens[1:, None], -1)[:, 0]
        nats = jax.nn.logsumexp(logits, -1) - target
        counted = weights[1:] > 0
        best = jnp.argmax(logits, -1) == tokens[1:]
        return jnp.sum(jnp.where(counted, nats * weights[1:], 0.0)), (
            best | ~counted
        ).all()

    return jax.lax.map(row, (hidden, batch.tokens, batch.weights))


def padded(rows: Rows, size: int) -> Batch:
    """A batch of exactly ``size`` rows; missing ones are all padding."""
    fill = lambda x: np.pad(x, ((0, size - len(rows)), (0, 0)))  # noqa: E731
    return Batch(*map(fill, (rows.tokens, rows.segments, rows.positions, rows.weights)))
