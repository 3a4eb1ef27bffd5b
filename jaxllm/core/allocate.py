"""Allocation: which option each layer gets under one budget of measured bytes."""

from __future__ import annotations

import numpy as np

from jaxllm.core import weights
from jaxllm.core.arrays import traced
from jaxllm.core.compose import (
    Context,
    Pipeline,
    Transform,
    compress_each,
    measured,
    transform,
)
from jaxllm.core.model import Model, get
from jaxllm.core.sensitivity import output_error
from jaxllm.core.spec import marked
from jaxllm.core.stats import KINDS


def allocate(losses, costs, budget: float | int, solver: str = "milp") -> list[int]:
    """The option of each layer with the least total loss within the budget.

    ``losses`` and ``costs`` are [layers, options]. ``milp`` is exact (SciPy's integer
    program: one option per layer, sum of costs at most the budget); ``greedy`` starts
    from the cheapest and takes the upgrade with the best gain per byte while one fits.

    Raises:
      ValueError: The cheapest options already exceed the budget.
    """
    _check_solver(solver)
    losses, costs = np.asarray(losses, np.float64), np.asarray(costs, np.float64)
    least = costs.min(1).sum()
    if least > budget:
        raise ValueError(
            f"budget of {budget:,.0f} bytes; the smallest options take {least:,.0f}"
        )
    return (_milp if solver == "milp" else _greedy)(losses, costs, budget)


def _check_solver(solver: str) -> None:
    if solver not in ("greedy", "milp"):
        raise ValueError(f"solver {solver!r}; accepted: 'greedy', 'milp'")


def _greedy(losses, costs, budget) -> list[int]:
    layers = np.arange(len(losses))
    chosen = costs.argmin(1)
    while True:
        gain = losses[layers, chosen][:, None] - losses
        extra = costs - costs[layers, chosen][:, None]
        spare = budget - costs[layers, chosen].sum()
        worth = np.where((gain > 0) & (extra <= spare), gain / np.maximum(extra, 1), 0)
        if not (worth > 0).any():
            return chosen.tolist()
        layer, option = np.unravel_index(worth.argmax(), worth.shape)
        chosen[layer] = option


def _milp(losses, costs, budget) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, options = losses.shape
    one_each = np.kron(np.eye(layers), np.ones(options))
    scale = max(float(np.abs(losses).max()), 1e-30)
    found = milp(
        losses.ravel() / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs.ravel()[None], -np.inf, budget),
        ],
        integrality=np.ones(losses.size),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        raise ValueError(f"no allocation found: {found.message}")
    return found.x.reshape(layers, options).argmax(1).tolist()


@transform
def mixed(options, bits: float | int, solver: str = "milp", sensitivity=output_error()):
    """Each weight gets one of several per-layer methods, within ``bits`` per weight.

    The budget counts stored bytes of the selected weights. ``sensitivity`` prices an
    option, by default with the layer's output error on the dense model's inputs.
    Where only shapes are known (``plan``), the largest options that fit are taken.
    """
    pipelines = tuple(pipeline_of(option) for option in options)
    return assigned(pipelines, bits, solver, sensitivity)


def assigned(
    pipelines: tuple[Pipeline, ...],
    bits=None,
    solver: str = "milp",
    sensitivity=output_error(),
):
    """The body of ``mixed``; without ``bits`` each weight gets its best pipeline."""
    _check_solver(solver)
    needs = tuple({*sensitivity.needs, *(n for p in pipelines for n in p.needs)})

    def run(model: Model, context: Context) -> Model:
        paths = context.paths(model)
        price = sensitivity(model, context)
        read = set(sensitivity.needs) & {*KINDS, "fisher"}
        found = measured(model, context, pipelines, price, read)
        losses = [[loss for loss, _ in found[path]] for path in paths]
        costs = [[cost for _, cost in found[path]] for path in paths]
        if traced(losses):
            losses = [[-cost for cost in row] for row in costs]
        budget = np.inf
        if bits is not None:
            entries = sum(weights.size(get(model.params, f"{p}.weight")) for p in paths)
            budget = bits * entries / 8
        chosen = allocate(losses, costs, budget, "greedy" if bits is None else solver)
        each = {p: pipelines[i] for p, i in zip(paths, chosen, strict=True)}
        return compress_each(model, context, each)

    return marked(run, needs=needs, adaptive=True, joint=bits is not None)


def pipeline_of(option) -> Pipeline:
    """The pipeline of a method that treats each weight by itself."""
    body = option.call if isinstance(option, Transform) else None
    found = getattr(getattr(body, "call", None), "pipeline", None)
    if found is None:
        raise TypeError(f"{option!r} is not a per-layer method")
    return found
