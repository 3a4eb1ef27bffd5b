"""Optimisers by name, through optax, with the weight decay where it belongs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

import jax
import optax
from optax import contrib

from jaxllm.core.model import dotted

Rate = float | optax.Schedule
Optimizer = optax.GradientTransformation


def is_matrix(path: str, leaf) -> bool:
    """Whether a parameter is a linear map (or stacked ones): these decay.

    Norm scales, biases and other vectors do not.
    """
    return leaf.ndim >= 2


def is_hidden_matrix(path: str, leaf) -> bool:
    """Whether Muon takes a parameter: matrices, embeddings and head left out."""
    outer = path.removeprefix("params.").split(".")[0]
    return leaf.ndim >= 2 and outer not in ("embed", "head", "positions")


def adamw(
    rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> Optimizer:
    """Adam with decoupled weight decay (arXiv:1711.05101), matrices only."""
    return optax.adamw(
        rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices
    )


def lion(
    rate: Rate, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.1
) -> Optimizer:
    """Lion (arXiv:2302.06675): the sign of a momentum."""
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=matrices)


def adafactor(
    rate: Rate, *, weight_decay: float | None = None, momentum: float | None = None
) -> Optimizer:
    """Adafactor (arXiv:1804.04235): second moments as row and column factors."""
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        clipping_threshold=1.0,
        momentum=momentum,
        weight_decay_rate=weight_decay,
        weight_decay_mask=matrices,
    )


def muon(
    rate: Rate,
    *,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    adam_scale: float = 1.0,
) -> Optimizer:
    """Muon for hidden matrices (orthogonalised momentum; Jordan et al. 2024), AdamW
    for the rest at ``adam_scale * rate``.

    Updates are scaled to the size of Adam's (0.2 sqrt(max(in, out)), Moonlight,
    arXiv:2502.16982), so that both take the same rates.
    """
    scaled = lambda step: adam_scale * _at(rate, step)  # noqa: E731
    return contrib.muon(
        rate,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        adam_b2=b2,
        adam_learning_rate=scaled,
        muon_weight_dimension_numbers=_muon_dimensions,
    )


def sgd(
    rate: Rate,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Gradient descent with momentum."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, matrices),
        optax.sgd(rate, momentum, nesterov),
    )


OPTIMIZERS = dict(adamw=adamw, lion=lion, adafactor=adafactor, muon=muon, sgd=sgd)


def optimizer(name: str, rate: Rate, **options) -> Optimizer:
    """An optimiser by name; clipping is the training step's.

    Raises:
      ValueError: Unknown name (the nearest is given), a hyperparameter out of range.
      TypeError: A hyperparameter that the optimiser does not have.
    """
    make = _find(name)
    known = [p for p in inspect.signature(make).parameters if p != "rate"]
    for option, value in options.items():
        if option not in known:
            raise TypeError(f"{name} has no {option!r}; it takes {', '.join(known)}")
        _check(name, option, value)
    return make(rate, **options)


def matrices(params):
    """The weight-decay mask of a parameter tree."""
    return by_path(is_matrix, params)


def by_path(choose: Callable, params):
    """A tree of ``choose(path, leaf)``, paths dotted."""
    return jax.tree_util.tree_map_with_path(lambda p, x: choose(dotted(p), x), params)


def _muon_dimensions(params):
    """Which axes Muon contracts: the last two, leading ones (experts) are batched."""

    def numbers(path: str, leaf):
        if not is_hidden_matrix(path, leaf):
            return None
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return by_path(numbers, params)


def _at(rate: Rate, step):
    return rate(step) if callable(rate) else rate


def _find(name: str) -> Callable:
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"optimizer is {name!r}; did you mean {near!r}? "
            f"known: {', '.join(OPTIMIZERS)}"
        )
    return OPTIMIZERS[name]


def _check(name: str, option: str, value) -> None:
    if option in ("b1", "b2", "momentum") and value is not None and not 0 <= value < 1:
        raise ValueError(f"{option} of {name} is {value}, expected one in [0, 1)")
    if option in ("weight_decay", "adam_scale") and value is not None and value < 0:
        raise ValueError(f"{option} of {name} is {value}, expected 0 or more")
    if option == "eps" and not value > 0:
        raise ValueError(f"eps of {name} is {value}, expected a positive number")
