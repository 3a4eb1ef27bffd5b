"""Learning of all blocks at once: equivalences, clipping and static ranges.

Where ``learned`` minimises the error of each block, here one loss of the whole model
has its gradients in all of them (MobileQuant, arXiv:2408.13933).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.adam import Best, adam_state, adam_updates
from jaxllm.core.affine import scaling
from jaxllm.core.batch import Batch
from jaxllm.core.compose import Context, inside
from jaxllm.core.equivalences import balance, producer_channels
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.learned import (
    Equivalence,
    Recipe,
    as_before,
    check_inside_blocks,
    in_float32,
)
from jaxllm.core.migration import centred
from jaxllm.core.model import Model, Site, get, put
from jaxllm.core.ranges import found_range, log_ends, static_range
from jaxllm.core.scales import absmax
from jaxllm.core.spec import expression, marked
from jaxllm.core.walk import Monitor, Seen, walk

LAST = 0.1  # rate, as a share of the first: where the cosine ends, as the authors' does
PARTS = ("sites", "weights", "inputs")  # of a block's theta


@expression
def rescaling(alpha: float = 0.5):
    """x~ = x / s at every site whose producer takes it: norm, v or up.

    At first s = max|x|^alpha / max|w|^(1 - alpha) as in SmoothQuant; log s is learned.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}; accepted: 0 to 1")

    def start(ws, site: Site, samples, key):
        if site.producer is None or not site.exclusive:
            return {}
        scale = jnp.log(balance(site, ws, centred(site, samples, False)[1], alpha))
        return dict(scale=producer_channels(site, scale))

    return Equivalence(start, scaling(alpha, False).call.change)


class Goal(NamedTuple):
    """``of(model, batch)`` [batch, length, any] and ``error(found, wanted)`` of it."""

    of: Callable[..., jax.Array]
    error: Callable[..., jax.Array]


@expression
def last_hidden():
    """The squared error of the last block's outputs, as in MobileQuant."""

    return Goal(
        functools.partial(_run, hidden_only=True),
        lambda found, wanted: ((found - wanted) ** 2).mean(-1),
    )


@expression
def next_token():
    """The divergence KL(p | q) of the next token's distribution p from the new q."""

    def of(model: Model, batch: Batch):
        return jax.nn.log_softmax(_run(model, batch))

    def error(found, wanted):
        return (jnp.exp(wanted) * (wanted - found)).sum(-1)

    return Goal(of, error)


def _run(model: Model, batch: Batch, **how):
    """The forward pass; equal blocks are one program, which compiles far sooner."""
    where = dict(positions=batch.positions, segments=batch.segments)
    run = model.config.forward
    return run(model.params, batch.tokens, scan=True, **where, **how).astype("float32")


@expression
def learn_whole(
    rounding,
    equivalence,
    activations: ActivationFormat,
    *,
    rule=absmax(),
    goal=last_hidden(),
    epochs: int = 20,
    rates: tuple[float, float, float] = (1e-3, 1e-2, 1e-2),
):
    """The body that learns equivalences, clipping and ranges of all blocks together.

    ``rounding`` is a parametrization of weights (``clipping``), ``equivalence`` one of
    sites (``rescaling``), ``activations`` a format whose ranges start as ``rule`` finds
    them behind the first equivalences; weights that read one input share its range.
    Adam minimises the ``goal``, an error against the dense model, one step per
    calibration batch; ``rates`` are those of equivalences, clipping and ranges and
    fall along a cosine to a tenth. The best epoch is kept, the start included.
    """
    if epochs < 0 or len(rates) != 3 or min(rates) < 0:
        raise ValueError(f"epochs {epochs}, rates {rates}: at least 0, three of them")
    recipe = Recipe(rounding, equivalence, static_range(activations))
    rate = dict(zip(PARTS, rates, strict=True))

    def run(model: Model, context: Context) -> Model:
        paths = context.paths(model)
        check_inside_blocks(model, paths)
        wide = model.replace(params=in_float32(model.params))
        plan = Whole(_runs(model, paths, recipe), goal)
        theta = _started(plan, wide, context, activations, rule)
        theta = _best(plan, theta, wide, context, epochs, rate)
        made = _rendered(plan, theta, wide)
        return model.replace(params=as_before(made.params, model.params))

    return marked(run, whole=True, needs=("inputs",))


@dataclasses.dataclass(frozen=True)
class Run:
    """Equal blocks: their paths, what is learned of each, the tap of each input.

    The theta of a block has ``sites`` and ``inputs`` by tap, ``weights`` by path; that
    of a run has a leading axis of blocks, so that they are one program.
    """

    paths: tuple[str, ...]
    recipe: Recipe
    taps: tuple[tuple[str, str], ...]

    def start(self, path, params, seen: Seen, key, format, rule) -> dict:
        """The first theta of a block; ranges are those behind its equivalences."""
        theta = self.recipe.start(params, seen, path, key)
        moved = self.recipe.changed(theta, params, jnp.ones(()))
        taken = seen.taps(moved)
        ranges = {}
        for tap in dict.fromkeys(tap for _, tap in self.taps):
            grid = found_range(format, rule, (), [t[tap] for t in taken])
            ranges[tap] = log_ends(format, *grid)
        return theta | dict(inputs=ranges)

    def made(self, theta, params, soft: bool):
        """A rounded block, with gradients or as it is stored."""
        inputs = {path: theta["inputs"][tap] for path, tap in self.taps}
        make = self.recipe if soft else self.recipe.render
        return make(theta | dict(inputs=inputs), params, jnp.ones(()))


class Whole(NamedTuple):
    """The static part: what is learned, and for what."""

    runs: tuple[Run, ...]
    goal: Any

    def model(self, theta, model: Model, soft: bool) -> Model:
        """All blocks rounded; ``theta`` has one entry for each run."""
        params = model.params
        for run, own in zip(self.runs, theta, strict=True):
            blocks = stacked([get(params, path) for path in run.paths])
            made = jax.vmap(functools.partial(run.made, soft=soft))(own, blocks)
            for i, path in enumerate(run.paths):
                params = put(params, path, jax.tree.map(lambda x, i=i: x[i], made))
        return model.replace(params=params)

    def loss(self, theta, model: Model, batch: Batch, wanted):
        """The mean error of the rounded model over the tokens that count."""
        found = self.goal.call.of(self.model(theta, model, True), batch)
        error = self.goal.call.error(found, wanted)
        if batch.weights is None:
            return error.mean()
        return (error * batch.weights).sum() / jnp.maximum(batch.weights.sum(), 1.0)


def stacked(trees):
    """One tree of float32 leaves with a leading axis, from equal ones."""
    return jax.tree.map(lambda *x: jnp.stack(x).astype(jnp.float32), *trees)


def _runs(model: Model, paths, recipe: Recipe) -> tuple[Run, ...]:
    """The blocks with any of the weights, those alike together."""
    sites = model.config.sites()
    whole = tuple(s for s in sites if set(paths) >= {*s.consumers})
    taps = {p: s.tap for s in sites for p in s.consumers}
    found: dict[Any, list[str]] = {}
    for block, definition in model.config.blocks():
        mine = [p for p in paths if inside(p, block)]
        short = lambda name, block=block: name.removeprefix(f"{block}.")  # noqa: E731
        own = tuple((short(p), short(taps[p])) for p in mine)
        leaves, tree = jax.tree.flatten(get(model.params, block))
        like = definition, tree, tuple(leaf.shape for leaf in leaves)
        key = recipe.inside(block, paths, whole), own, like
        if mine:
            found.setdefault(key, []).append(block)
    return tuple(Run(tuple(v), *key[:2]) for key, v in found.items())


def _started(plan: Whole, model: Model, context: Context, format, rule) -> list[dict]:
    """The first theta of all runs, on the inputs of the dense model."""
    runs = {path: run for run in plan.runs for path in run.paths}
    theta: dict[str, dict] = {}

    def visit(params, block, seen: Seen):
        own = get(params, block)
        begin = runs[block].start
        theta[block] = begin(block, own, seen, context.key, format, rule)
        return params

    silent = None if context.monitor is None else Monitor(context.monitor.progress)
    walk(
        model,
        context.calibration,
        (),
        visit,
        inputs=True,
        label="start",
        monitor=silent,
        wants=runs.__contains__,
    )
    return [stacked([theta[path] for path in run.paths]) for run in plan.runs]


def _best(plan: Whole, theta, model: Model, context: Context, epochs: int, rate):
    """The theta of the least loss after any epoch; the losses go to the monitor."""
    batches = list(context.calibration)
    wanted = [_target(plan, model, batch) for batch in batches]
    pairs = [*zip(batches, wanted, strict=True)]
    state = adam_state(theta)
    total = lambda theta: jnp.stack(  # noqa: E731
        [_loss(plan, theta, model, *pair) for pair in pairs]
    ).mean()
    best, done = Best.start(theta, total(theta)), 0
    for _ in range(epochs):
        for pair in pairs:
            fall = (1 + np.cos(np.pi * done / (epochs * len(pairs)))) / 2
            share = jnp.float32(LAST + (1 - LAST) * fall)
            now = {name: share * value for name, value in rate.items()}
            theta, state = _step(plan, theta, state, now, model, *pair)
            done += 1
        best = best.or_this(theta, total(theta))
    best.note(context.monitor, "whole")
    return best.value


@functools.partial(jax.jit, static_argnums=0)
def _target(plan: Whole, model: Model, batch: Batch):
    return plan.goal.call.of(model, batch)


@functools.partial(jax.jit, static_argnums=0)
def _loss(plan: Whole, theta, model: Model, batch: Batch, wanted):
    return plan.loss(theta, model, batch, wanted)


@functools.partial(jax.jit, static_argnums=0)
def _rendered(plan: Whole, theta, model: Model) -> Model:
    return plan.model(theta, model, False)


@functools.partial(jax.jit, static_argnums=0)
def _step(plan: Whole, theta, state, rate, model: Model, batch: Batch, wanted):
    slopes = jax.grad(plan.loss)(theta, model, batch, wanted)
    updates, state = adam_updates(slopes, state)

    def moved(path, value, update):
        return value - rate[path[1].key] * update

    return jax.tree_util.tree_map_with_path(moved, theta, updates), state
