"""Curvature of the language-model loss: traces of its Hessian, weight by weight."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.batch import Batch
from jaxllm.core.model import Model, Params, layer_key, with_weights
from jaxllm.core.slopes import cross_entropy, dense_weights
from pallas_kernels import backend

Traces = dict[str, Float[Array, ""]]


def hessian_traces(
    model: Model, batches: Iterable[Batch], paths: tuple[str, ...], probes: int, key
) -> Traces:
    """tr(d2L / dW2) for each weight, by Hutchinson's estimate E[vT H v].

    v has random signs, one draw per weight, batch and probe; one Hessian-vector
    product serves all weights, as the cross terms have mean zero.
    """
    ws = dense_weights(model, paths)
    total, count = dict.fromkeys(paths, jnp.zeros(())), 0
    for batch in batches:
        for _ in range(probes):
            drawn = jax.random.fold_in(key, count)
            signs = {
                path: jax.random.rademacher(layer_key(drawn, path), w.shape, w.dtype)
                for path, w in ws.items()
            }
            found = _probed(model.config, model.params, ws, signs, batch)
            total = jax.tree.map(jnp.add, total, found)
            count += 1
    return {path: value / max(count, 1) for path, value in total.items()}


@functools.partial(jax.jit, static_argnums=0)
def _probed(config, params: Params, ws, signs, batch: Batch) -> Traces:
    """vT H v of every weight; kernels have no second derivative, the reference has."""

    def loss(ws):
        return cross_entropy(with_weights(Model(params, config), ws), batch)

    with backend("reference"):
        product = jax.jvp(jax.grad(loss), (ws,), (signs,))[1]
    each = lambda v, p: (v * p).astype(jnp.float32).sum()  # noqa: E731
    return jax.tree.map(each, signs, product)
