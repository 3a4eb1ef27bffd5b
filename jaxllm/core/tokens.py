"""Tokens: by which score layers drop some of them and round others further."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.formats import ActivationFormat
from jaxllm.core.model import Model
from jaxllm.core.spec import expression, marked
from jaxllm.core.streams import TokenRule, View


@expression
def start_attention():
    """What a token pays to the first one of its document, p[i, 0] (Agile-Quant).

    Attention that finds nothing worth reading goes to the first token; the authors
    keep the tokens that send most of it there (arXiv:2312.05693, their code).
    """
    return lambda view: view.mix(view.first.astype(jnp.float32))


@expression
def received_attention():
    """What a token receives from those that see it, sum_i p[i, t] / count (H2O)."""

    def score(view: View):
        ones = jnp.ones(view.seen.shape, jnp.float32)
        received = jax.vjp(view.mix, ones)[1](ones)[0]
        return received / view.seen.astype(jnp.float32)

    return score


@expression
def fewer_tokens(
    score=start_attention(),
    drop: float = 0.0,
    lower: float = 0.0,
    format: ActivationFormat | None = None,
    *,
    first: int = 0,
    last: int | None = None,
):
    """The body that gives the layers from ``first`` on (below ``last``) a rule.

    ``drop`` and ``lower`` are shares of the tokens that reach a layer. Rounded tokens
    stay rounded in all layers behind. Negative numbers count from the end.
    """
    rule = TokenRule(score, drop, lower, format)
    follow = TokenRule(rule.score, format=format)

    def run(model: Model, context) -> Model:
        paths = [path for path, _ in model.config.blocks()]
        chosen = paths[slice(first, last)]
        if not chosen:
            raise ValueError(
                f"layers {first} to {last} of {len(paths)}: no layer is chosen"
            )
        behind = paths[paths.index(chosen[-1]) + 1 :] if lower else []
        rules = dict.fromkeys(chosen, rule) | dict.fromkeys(behind, follow)
        return model.replace(config=model.config.with_tokens(rules))

    return marked(run, whole=True)
