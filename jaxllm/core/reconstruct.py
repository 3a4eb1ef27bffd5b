"""Reconstruction: block-wise gradient optimisation of any parametrised weight.

A parametrization says how a weight depends on what is learned: ``start`` gives the
first theta, ``soft`` a dense array that gradients pass through, ``render`` the weight
that is stored. ``soft`` and ``render`` stand for the same values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.adam import Best, adam_state, adam_updates
from jaxllm.core.arrays import as_stored, straight_through
from jaxllm.core.compose import Context, inside
from jaxllm.core.formats import TINY, Integer
from jaxllm.core.model import Model, get, layer_key, put
from jaxllm.core.scales import Grid, group_of, group_peaks
from jaxllm.core.spec import expression, marked
from jaxllm.core.walk import Seen, walk

Theta = Any


class Parametrization(NamedTuple):
    """``start(w, stats, key)``, ``soft(theta, w)`` and ``render(theta, w)``."""

    start: Callable[..., Theta]
    soft: Callable[..., jax.Array]
    render: Callable[..., Any]


@expression
def clipping(
    bits: int = 4,
    group_size: int | None = 128,
    start: float = 4.0,
    symmetric: bool = False,
):
    """Learned weight clipping (OmniQuant, arXiv:2308.13137, eq. 2).

    s = (sigmoid(gamma) max w - sigmoid(beta) min w) / (2^bits - 1) per group,
    z = -round(sigmoid(beta) min w / s); gamma = beta = ``start`` at first. The zero
    point is bounded to the codes and scales are stored as bfloat16. ``symmetric`` has
    no beta and no z: s = sigmoid(gamma) max|w| / (2^(bits - 1) - 1).
    """
    integers = Integer(bits, symmetric)
    grid, last = Grid(integers, group_size), integers.codes - 1

    def begin(w, stats, key):
        count = int(-(-len(w) // min(group_size or len(w), len(w))))
        value = jnp.full((count, w.shape[1]), start)
        return dict(gamma=value) if symmetric else dict(gamma=value, beta=value)

    def soft(theta, w):
        rows = group_of(grid, len(w))
        scale, zero = _clipped(grid, theta, w)
        shift = integers.offset if zero is None else zero[rows]
        u = w / scale[rows] + shift
        code = jnp.clip(straight_through(jnp.round(u), u), 0.0, last)
        return (code - shift) * scale[rows]

    def render(theta, w):
        return grid.pack(w, _clipped(grid, theta, w), None, w.dtype)

    return Parametrization(begin, soft, render)


def _clipped(grid: Grid, theta, w):
    """Scale and zero point [groups, out] (or None), as stored, with gradients."""
    last = grid.format.codes - 1
    share = {name: jax.nn.sigmoid(logit) for name, logit in theta.items()}
    high, low = (jnp.maximum(group_peaks(grid, x), 0.0) for x in (w, -w))
    stored = lambda scale: straight_through(as_stored(scale), scale)  # noqa: E731
    if grid.format.symmetric:
        scale = share["gamma"] * jnp.maximum(high, low) / grid.format.largest
        return stored(jnp.maximum(scale, TINY)), None
    high, low = share["gamma"] * high, share["beta"] * low
    scale = stored(jnp.maximum((high + low) / last, TINY))
    zero = low / scale
    return scale, straight_through(jnp.clip(jnp.round(zero), 0, last), zero)


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
            ws = {p: dense(params, p) for p in mine}
            start = parametrization.call.start
            keys = {p: layer_key(context.key, p) for p in mine}
            theta = {
                p.removeprefix(f"{block}."): start(w, None, keys[p])
                for p, w in ws.items()
            }
            own = get(params, block)
            plan = Plan(Each(parametrization), seen.block)
            goals = [target(seen.block, own, *item) for item in seen.inputs]
            best, _ = learned(plan, Pace(epochs, rate), theta, own, seen, goals)
            for p, w in ws.items():
                made = best[p.removeprefix(f"{block}.")]
                made = parametrization.call.render(made, w)
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


def dense(params, path: str):
    """The weight at a path in float32; what is not a dense matrix is refused."""
    w = get(params, f"{path}.weight")
    if weights.compressed(w):
        raise TypeError(f"{path} is {type(w).__name__}: reconstruct dense weights")
    if w.ndim != 2:
        raise TypeError(f"{path}: expert weights are not reconstructed")
    return w.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Each:
    """Soft parameters of a block in which each weight has its own theta, by path."""

    parametrization: Any

    def __call__(self, theta, params, progress):
        for path, own in theta.items():
            soft = self.parametrization.call.soft(own, dense(params, path))
            params = put(params, f"{path}.weight", soft)
        return params


class Plan(NamedTuple):
    """The static part of one block's optimisation; equal blocks share compilations.

    ``soft(theta, params, progress)`` gives the block's parameters; ``progress`` goes
    from 0 in the first epoch to 1 in the last.
    """

    soft: Callable[..., Any]
    block: Any


class Pace(NamedTuple):
    """How many epochs, and Adam's rate: one, or one for each part of theta by name."""

    epochs: int
    rate: float | dict[str, float]


def learned(plan: Plan, pace: Pace, theta, params, seen: Seen, goals):
    """(best theta, its progress) after Adam, one step per batch and epoch.

    The mean squared error to the ``goals`` (outputs, one per batch of inputs) is
    measured after every epoch and noted; its least value, the start's included, wins.
    """
    theta = jax.tree.map(jnp.float32, theta)  # never weakly typed: one compiled step
    state, batches = adam_state(theta), seen.inputs

    def total(theta, progress):
        pairs = zip(batches, goals, strict=True)
        losses = [_loss(plan, theta, params, progress, *x, y) for x, y in pairs]
        return jnp.stack(losses).mean()

    progress = jnp.float32(0)
    best = Best.start((theta, progress), total(theta, progress))
    for epoch in range(pace.epochs):
        progress = jnp.float32(epoch / max(pace.epochs - 1, 1))
        for (hidden, rest), goal in zip(batches, goals, strict=True):
            inputs = (params, progress, hidden, rest, goal)
            theta, state = _step(plan, theta, state, pace.rate, *inputs)
        best = best.or_this((theta, progress), total(theta, progress))
    seen.record(**best.errors())
    return best.value


@functools.partial(jax.jit, static_argnums=0)
def target(block, params, hidden, rest):
    """What a block makes of one batch."""
    return block.run(params, hidden, *rest)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(plan: Plan, theta, params, progress, hidden, rest, goal):
    """Mean squared error of the block's output over tokens that count."""
    params = plan.soft(theta, params, progress)
    error = (plan.block.run(params, hidden, *rest)[0] - goal).astype(jnp.float32) ** 2
    share = rest[2]
    if share is None:
        return error.mean()
    return (error * share[..., None]).sum() / (share.sum() * error.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def _step(plan: Plan, theta, state, rate, params, progress, hidden, rest, goal):
    grads = jax.grad(_loss, 1)(plan, theta, params, progress, hidden, rest, goal)
    updates, state = adam_updates(grads, state)

    def moved(path, value, update):
        own = rate[path[0].key] if isinstance(rate, dict) else rate
        return value - own * update

    return jax.tree_util.tree_map_with_path(moved, theta, updates), state
