"""Rounding what reaches a weight, whatever the weight is by then."""

from __future__ import annotations

from jaxllm.core.compose import Context
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.model import Model, weight, with_weight
from jaxllm.core.spec import expression
from jaxllm.core.weights.activation import round_input


@expression
def round_inputs(format: ActivationFormat):
    """The body that rounds the inputs of finished weights, after online transforms."""

    def run(model: Model, context: Context) -> Model:
        for path in context.paths(model):
            model = with_weight(model, path, round_input(weight(model, path), format))
        return model

    return run
