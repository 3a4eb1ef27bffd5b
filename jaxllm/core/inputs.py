"""Rounding what reaches a weight, whatever the weight is by then."""

from __future__ import annotations

import dataclasses

from jaxllm.core.compose import Context
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.model import Model, weight, with_weight
from jaxllm.core.spec import expression
from jaxllm.core.weights import ActivationQuantized, Transformed


@expression
def round_inputs(format: ActivationFormat):
    """The body that rounds the inputs of finished weights, after online transforms."""

    def run(model: Model, context: Context) -> Model:
        for path in context.paths(model):
            model = with_weight(model, path, _rounded(weight(model, path), format))
        return model

    return run


def _rounded(w, format: ActivationFormat):
    """A weight whose input is rounded to ``format``, behind what turns that input."""
    if isinstance(w, Transformed):
        return dataclasses.replace(w, inner=_rounded(w.inner, format))
    if isinstance(w, ActivationQuantized):
        return dataclasses.replace(w, format=format)
    return ActivationQuantized(w, format)
