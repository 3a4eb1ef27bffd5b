"""Slopes of the language-model loss: what a Taylor expansion of it reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.batch import Batch, targets
from jaxllm.core.model import Model, Params, get, with_weights
from jaxllm.core.weights import compressed

Slopes = dict[str, tuple[Array, Array]]


def cross_entropy(model: Model, batch: Batch) -> Float[Array, ""]:
    """Mean loss of the next token in nats, over the targets that count."""
    return _total(model, batch) / jnp.maximum(targets(batch)[1].sum(), 1.0)


def _total(model: Model, batch: Batch) -> Float[Array, ""]:
    following, weight = targets(batch)
    logits = model(batch.tokens, positions=batch.positions, segments=batch.segments)
    chosen = jnp.take_along_axis(logits, following[..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - chosen
    return (losses * weight).sum()


def mean_loss(model: Model, batches: Iterable[Batch]) -> Float[Array, ""]:
    """The mean of ``cross_entropy`` over batches."""
    return jnp.stack([_jitted(model, batch) for batch in batches]).mean()


_jitted = jax.jit(cross_entropy)


def dense_weights(model: Model, paths: tuple[str, ...]) -> dict[str, Array]:
    """The weights at these paths, which must still be arrays."""
    ws = {path: get(model.params, f"{path}.weight") for path in paths}
    for path, w in ws.items():
        if compressed(w):
            raise TypeError(f"{path} is {type(w).__name__}: it has no dense gradient")
    return ws


def slopes(model: Model, batches: Iterable[Batch], paths: tuple[str, ...]) -> Slopes:
    """For each weight path, gradient g and Fisher diagonal f of the mean loss.

    Both are averages over sequences. f is T g^2 for a sequence of T targets: what the
    squares of single targets' gradients sum to, over T, when they are independent.
    """
    ws = dense_weights(model, paths)
    blank = lambda w: jnp.zeros(w.shape, jnp.float32)  # noqa: E731
    total = jax.tree.map(lambda w: (blank(w), blank(w)), ws)
    count = 0
    for batch in batches:
        total = _added(model.config, model.params, ws, batch, total)
        count += len(batch.tokens)
    return jax.tree.map(lambda x: x / max(count, 1), total)


@functools.partial(jax.jit, static_argnums=0)
def _added(config, params: Params, ws, batch: Batch, total):
    """``total`` plus gradient and squared gradient of every sequence of a batch."""

    def loss(ws, row: Batch):
        return cross_entropy(with_weights(Model(params, config), ws), row)

    def one(total, row):
        row = jax.tree.map(lambda x: x[None], row)
        found, length = jax.grad(loss)(ws, row), targets(row)[1].sum()
        found = jax.tree.map(lambda g: g.astype(jnp.float32), found)
        pairs = {path: (g, length * g * g) for path, g in found.items()}
        return jax.tree.map(jnp.add, total, pairs), None

    return jax.lax.scan(one, total, batch)[0]
