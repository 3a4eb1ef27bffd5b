"""Depth: which layers of a model do least, and the model without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.arrays import traced
from jaxllm.core.compose import Context
from jaxllm.core.model import Model, get
from jaxllm.core.slicing import cut_layers
from jaxllm.core.slopes import mean_loss
from jaxllm.core.spec import expression, marked
from jaxllm.core.walk import Seen, walk


@expression(needs=("hidden",))
def block_influence():
    """1 - E[cos(x_in, x_out)] of each block (ShortGPT, arXiv:2403.03853, eq. 1)."""

    def score(model: Model, batches) -> list[jax.Array]:
        found = []

        def visit(params, path, seen: Seen):
            if seen.block is not None:
                found.append(_turning(seen, get(params, path)))
            return params

        walk(model, batches, (), visit, inputs=True, label="influence")
        return found

    return score


def _turning(seen: Seen, params) -> jax.Array:
    """Mean of 1 - cos between the hidden states before and after a block."""
    total = count = jnp.zeros(())
    for hidden, rest in seen.inputs:
        after = seen.block.run(params, hidden, *rest)[0].astype(jnp.float32)
        before = jnp.asarray(hidden, jnp.float32)
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = (before * after).sum(-1) / jnp.maximum(norms, 1e-12)
        share = jnp.ones(cosine.shape) if rest[2] is None else rest[2]
        total, count = total + ((1 - cosine) * share).sum(), count + share.sum()
    return total / jnp.maximum(count, 1.0)


@expression(needs=("hidden",))
def removal_loss():
    """The language-model loss without each layer (Minitron, arXiv:2407.14679)."""

    def score(model: Model, batches) -> list[jax.Array]:
        layers = range(len(model.config.blocks()))
        without = [tuple(i for i in layers if i != gone) for gone in layers]
        return [mean_loss(cut_layers(model, kept), batches) for kept in without]

    return score


@expression
def drop_layers(score, count: int, *, again: bool = False):
    """The body that removes the ``count`` layers of least score.

    ``again`` scores what is left after every removal. Where only shapes are known,
    the last layers go.
    """
    check_count(count)

    def run(model: Model, context: Context) -> Model:
        check_count(count, len(model.config.blocks()))
        for gone in (1,) * count if again else (count,) * bool(count):
            model = _without(model, score(model, context.calibration), gone)
        return model

    return marked(run, whole=True)


def check_count(count: int, depth: int | None = None) -> None:
    """Refuse to remove fewer than no layers, or all of ``depth``."""
    if count < 0:
        raise ValueError(f"count {count}; accepted: at least 0")
    if depth is not None and count >= depth:
        raise ValueError(f"{count} of {depth} layers; at least one has to stay")


def _without(model: Model, scores: list[jax.Array], count: int) -> Model:
    hidden = traced(scores)
    known = -np.arange(len(scores)) if hidden else np.asarray(scores, np.float64)
    order = np.argsort(known, kind="stable")
    gone = set(order[:count].tolist())
    return cut_layers(model, tuple(i for i in range(len(scores)) if i not in gone))
