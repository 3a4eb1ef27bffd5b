"""The outlier twin: the same function as a model, with outlier channels put in.

Small models have no outliers, large ones do. Claims about outliers are tested on a
twin whose activations have them for both known reasons: the residual stream's energy
lies in a few channels, and a few norm scales are large.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.batch import Batch
from jaxllm.core.equivalences import fold
from jaxllm.core.model import Model, get, layer_key
from jaxllm.core.rotations import rotate_residual
from jaxllm.core.stats import Stats
from jaxllm.core.weights import Orthogonal


def outlier_twin(
    model: Model,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    channels: int = 2,
    factor: float = 20.0,
) -> Model:
    """A twin of a dense model with RMS norms, equal in function.

    The stream is turned to its principal axes on ``batch`` (its large mean becomes
    one large channel, which no rescaling undoes), then ``channels`` inputs of every
    site are multiplied by ``factor`` in the producer and divided in the consumers.
    """
    key = jax.random.key(0) if key is None else key
    gram = _stream_gram(model, batch)
    _, axes = jnp.linalg.eigh(gram)
    twin = rotate_residual(model, Orthogonal(axes[:, ::-1]))
    params = twin.params
    for site in twin.config.sites():
        if site.producer is not None and site.exclusive and site.repeat == 1:
            width = _width(params, site)
            chosen = jax.random.permutation(layer_key(key, site.tap), width)[:channels]
            scale = jnp.ones(width).at[chosen].set(factor)
            params = fold(params, site, scale)
    return twin.replace(params=params)


def _stream_gram(model: Model, batch: Batch) -> jax.Array:
    """Mean of h hT over the last block's output, [width, width]."""
    hidden = model.config.forward(
        model.params,
        batch.tokens,
        positions=batch.positions,
        segments=batch.segments,
        hidden_only=True,
    )
    return Stats.of(("gram",), hidden, batch.weights).gram.mean


def _width(params, site) -> int:
    return get(params, f"{site.consumers[0]}.weight").shape[-2]
