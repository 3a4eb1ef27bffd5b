"""Squared gradients of weights, the statistic that no layer input tells."""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.core.model import Model
from jaxllm.core.slopes import slopes
from jaxllm.core.stats import Fisher


def squared_gradients(model: Model, batches, paths: tuple[str, ...]):
    """For each weight path, its ``Fisher``: squared gradients of single sequences."""
    count = float(sum(len(batch.tokens) for batch in batches))
    found = slopes(model, batches, paths)
    return {
        path: Fisher(square * count, jnp.full(square.shape[:-2], count))
        for path, (_, square) in found.items()
    }
