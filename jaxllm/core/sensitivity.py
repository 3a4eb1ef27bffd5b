"""Sensitivity: what storing one weight in another form costs the model.

A sensitivity is called as ``price(model, context)``; the function it gives is called
as ``loss(path, w, made, stats)`` for the weight at a path and what may replace it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.compose import Context
from jaxllm.core.curvature import hessian_traces
from jaxllm.core.model import Model, with_weight
from jaxllm.core.slopes import mean_loss
from jaxllm.core.spec import expression
from jaxllm.core.stats import output_energy
from jaxllm.core.weights import materialize


def _delta(w, made):
    return (materialize(w) - materialize(made)).astype(jnp.float32)


@expression(needs=("gram",))
def output_error():
    """tr((W - V)T E[x xT] (W - V)): the error of the layer's outputs."""

    @jax.jit
    def loss(w, made, stats):
        return output_energy(stats.gram.mean, _delta(w, made))

    return lambda model, context: lambda path, w, made, stats: loss(w, made, stats)


@expression(needs=("fisher",))
def fisher_error():
    """Sum F (w - v)^2 / 2 with F the squared gradients: the loss to second order."""

    @jax.jit
    def loss(w, made, stats):
        return (stats.fisher.mean * _delta(w, made) ** 2).sum() / 2

    return lambda model, context: lambda path, w, made, stats: loss(w, made, stats)


@expression(needs=("curvature",))
def trace_error(probes: int = 4):
    """|tr(H)| / n |W - V|^2 / 2, H the loss's Hessian in this weight of n entries.

    The trace is estimated by Hutchinson's method with ``probes`` random signs per
    calibration batch (HAWQ-V2, arXiv:1911.03852, eq. 7 and algorithm 1).
    """
    if probes < 1:
        raise ValueError(f"probes {probes}; accepted: at least 1")

    def price(model: Model, context: Context):
        paths, key = context.paths(model), context.key
        traces = hessian_traces(model, context.calibration, paths, probes, key)

        def loss(path, w, made, stats):
            delta = _delta(w, made)
            return jnp.abs(traces[path]) / delta.size * (delta**2).sum() / 2

        return loss

    return price


@expression(needs=("loss",))
def loss_increase(batches: int | None = None):
    """The language-model loss with this weight replaced, less that without.

    Measured on the first ``batches`` of the calibration data (None: all), nothing
    else being changed.
    """
    if batches is not None and batches < 1:
        raise ValueError(f"batches {batches}; accepted: None or at least 1")

    def price(model: Model, context: Context):
        data = tuple(context.calibration)[:batches]
        before = mean_loss(model, data)

        def loss(path, w, made, stats):
            return mean_loss(with_weight(model, path, materialize(made)), data) - before

        return loss

    return price


# By the names that methods take.
SENSITIVITIES = {
    "gram": output_error,
    "fisher": fisher_error,
    "trace": trace_error,
    "loss": loss_increase,
}


def sensitivity(name: str):
    """The member of this vocabulary with a short name: gram, fisher, trace or loss."""
    if name not in SENSITIVITIES:
        accepted = ", ".join(SENSITIVITIES)
        raise ValueError(f"sensitivity {name!r}; accepted: {accepted}")
    return SENSITIVITIES[name]()
