"""Reconstruction: block-wise gradient optimisation of any parametrised weight.

A parametrization says how a weight depends on what is learned: ``start`` gives the
first theta, ``soft`` a dense array that gradients pass through, ``render`` the weight
that is stored. ``soft`` and ``render`` stand for the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import weights
from jaxllm.core.compose import Context, inside
from jaxllm.core.formats import TINY, Integer
from jaxllm.core.model import Model, get, layer_key, put
from jaxllm.core.scales import Grid, group_of
from jaxllm.core.spec import expression, marked
from jaxllm.core.walk import Seen, walk

Theta = Any


class Parametrization(NamedTuple):
    """``start(w, stats, key)``, ``soft(theta, w)`` and ``render(theta, w)``."""

    start: Callable[..., Theta]
    soft: Callable[..., jax.Array]
    render: Callable[..., Any]


def straight_through(rounded, x):
    """The value of ``rounded`` with the gradient of ``x``."""
    return x + jax.lax.stop_gradient(rounded - x)


@expression
def clipping(bits: int = 4, group_size: int | None = 128, start: float = 4.0):
    """Learned weight clipping (OmniQuant, arXiv:2308.13137, eq. 2).

    s = (sigmoid(gamma) max w - sigmoid(beta) min w) / (2^bits - 1) per group,
    z = -round(sigmoid(beta) min w / s); gamma = beta = ``start`` at first. The zero
    point is bounded to the codes and scales are stored as bfloat16.
    """
    grid = Grid(Integer(bits), group_size)
    last = grid.format.codes - 1

    def parameters(theta, w):
        """Scale and zero point [groups, out], as stored, with gradients."""
        rows = group_of(grid, len(w))
        count = int(-(-len(w) // min(group_size or len(w), len(w))))
        high = jax.ops.segment_max(w, rows, count)
        low = -jax.ops.segment_max(-w, rows, count)
        high = jax.nn.sigmoid(theta["gamma"]) * jnp.maximum(high, 0.0)
        low = jax.nn.sigmoid(theta["beta"]) * jnp.minimum(low, 0.0)
        scale = jnp.maximum((high - low) / last, TINY)
        stored = scale.astype(jnp.bfloat16).astype(jnp.float32)
        scale = straight_through(stored, scale)
        zero = -low / scale
        return scale, straight_through(jnp.clip(jnp.round(zero), 0, last), zero)

    def begin(w, stats, key):
        count = int(-(-len(w) // min(group_size or len(w), len(w))))
        value = jnp.full((count, w.shape[1]), start)
        return dict(gamma=value, beta=value)

    def soft(theta, w):
        scale, zero = (p[group_of(grid, len(w))] for p in parameters(theta, w))
        u = w / scale + zero
        code = jnp.clip(straight_through(jnp.round(u), u), 0.0, last)
        return (code - zero) * scale

    def render(theta, w):
        return grid.pack(w, parameters(theta, w), None, w.dtype)

    return Parametrization(begin, soft, render)


@expression
def reconstruct(parametrization, *, epochs: int = 10, rate: float = 5e-3):
    """The body that learns each block's theta so that its outputs stay the dense ones.

    Minimises the mean squared error between the block with soft weights and the dense
    block, on the inputs that the already changed prefix gives (OmniQuant feeds the
    dense block the dense inputs), with Adam, one step per calibration batch. The best
    theta at the end of an epoch is kept: the error never ends above its start.
    """
    if epochs < 1 or rate <= 0:
        raise ValueError(f"epochs {epochs}, rate {rate}: at least 1 and above 0")

    def run(model: Model, context: Context) -> Model:
        paths = context.paths(model)

        def visit(params, block, seen: Seen):
            mine = tuple(p for p in paths if inside(p, block))
            ws = {p: _dense(params, p) for p in mine}
            start = parametrization.call.start
            keys = {p: layer_key(context.key, p) for p in mine}
            theta = {p: start(w, None, keys[p]) for p, w in ws.items()}
            plan = _Plan(parametrization, seen.block, block, epochs, rate)
            theta, errors = _learned(plan, theta, ws, get(params, block), seen.inputs)
            seen.record(error_before=errors[0], error_after=errors[1])
            for p, w in ws.items():
                made = parametrization.call.render(theta[p], w)
                params = put(params, f"{p}.weight", made)
            return params

        wants = lambda block: any(inside(p, block) for p in paths)  # noqa: E731
        return walk(
            model,
            context.calibration,
            (),
            visit,
            inputs=True,
            label="reconstruct",
            monitor=context.monitor,
            wants=wants,
        )

    return marked(run, needs=("inputs",))


def _dense(params, path: str):
    w = get(params, f"{path}.weight")
    if weights.compressed(w):
        raise TypeError(f"{path} is {type(w).__name__}: reconstruct dense weights")
    if w.ndim != 2:
        raise TypeError(f"{path}: expert weights are not reconstructed")
    return w.astype(jnp.float32)


class _Plan(NamedTuple):
    """The static part of one block's optimisation; equal blocks share compilations."""

    parametrization: Any
    block: Any
    path: str
    epochs: int
    rate: float


def _learned(plan: _Plan, theta, ws, params, inputs):
    """The best theta and the errors (at the start, of the best)."""
    short = {p: p.removeprefix(f"{plan.path}.") for p in ws}
    ws = {short[p]: w for p, w in ws.items()}
    theta = {short[p]: t for p, t in theta.items()}
    static = plan._replace(path="")
    optimizer = optax.adam(plan.rate)
    state = optimizer.init(theta)
    goals = [_target(static, params, hidden, rest) for hidden, rest in inputs]

    def total(theta):
        pairs = zip(inputs, goals, strict=True)
        losses = [_loss(static, theta, ws, params, *x, y) for x, y in pairs]
        return jnp.stack(losses).mean()

    first = least = total(theta)
    best = theta
    for _ in range(plan.epochs):
        for (hidden, rest), goal in zip(inputs, goals, strict=True):
            theta, state = _step(static, theta, state, ws, params, hidden, rest, goal)
        now = total(theta)
        keep = functools.partial(jnp.where, now < least)
        best = jax.tree.map(keep, theta, best)
        least = keep(now, least)  # a diverged loss is no number
    return {p: best[short[p]] for p in short}, (first, least)


@functools.partial(jax.jit, static_argnums=0)
def _target(plan: _Plan, params, hidden, rest):
    return plan.block.run(params, hidden, *rest)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(plan: _Plan, theta, ws, params, hidden, rest, goal):
    """Mean squared error of the block's output over tokens that count."""
    for path, w in ws.items():
        soft = plan.parametrization.call.soft(theta[path], w)
        params = put(params, f"{path}.weight", soft)
    error = (plan.block.run(params, hidden, *rest)[0] - goal).astype(jnp.float32) ** 2
    share = rest[2]
    if share is None:
        return error.mean()
    return (error * share[..., None]).sum() / (share.sum() * error.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def _step(plan: _Plan, theta, state, ws, params, hidden, rest, goal):
    grads = jax.grad(_loss, 1)(plan, theta, ws, params, hidden, rest, goal)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
        updates, state = optax.adam(plan.rate).update(grads, state)
        return optax.apply_updates(theta, updates), state
