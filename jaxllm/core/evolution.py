"""Evolution under a budget: which level each part of a model gets (EvoPress).

A candidate is a tuple of levels, one per unit. ``evolve`` knows nothing of models; the
two bodies below it search the options of each weight, and the layers to leave out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import weights
from jaxllm.core.allocate import pipeline_of
from jaxllm.core.arrays import traced
from jaxllm.core.compose import Context, Pipeline, measured
from jaxllm.core.depth import check_count
from jaxllm.core.model import Model, get, with_weights
from jaxllm.core.slicing import cut_layers
from jaxllm.core.spec import expression, marked
from jaxllm.core.weights import materialize

Levels = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Evolution:
    """How long to search, and with how much data.

    Of ``offspring`` mutants per generation ``survivors[i]`` are left after selection
    i, which reads ``batches[i]`` batches of the calibration data; the parent joins
    the last one.
    """

    generations: int = 40
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 1)
    batches: tuple[int, ...] = (1, 4)

    def __post_init__(self):
        falls = all(
            a >= b for a, b in zip(self.survivors, self.survivors[1:], strict=False)
        )
        if self.generations < 0 or self.offspring < 1:
            raise ValueError(
                f"generations {self.generations}, offspring {self.offspring}: 0, 1"
            )
        if not falls or self.survivors[-1:] != (1,):
            raise ValueError(f"survivors {self.survivors}; accepted: falling to 1")
        if len(self.batches) != len(self.survivors) or min(self.batches) < 1:
            raise ValueError(f"batches {self.batches}; accepted: one per selection")


def evolve(
    start: Levels,
    mutate: Callable[[Levels, np.random.Generator], Levels],
    fitness: Callable[[Levels, int], float],
    plan: Evolution,
    rng: np.random.Generator,
) -> Levels:
    """The (1 + lambda) search of EvoPress (arXiv:2410.14649, algorithm 1).

    ``fitness(levels, batches)`` is what falls. On the data of the last selection the
    result is never worse than ``start``.
    """
    known: dict[tuple[Levels, int], float] = {}

    def price(levels: Levels, batches: int) -> float:
        at = levels, batches
        if at not in known:
            known[at] = float(fitness(levels, batches))
        return known[at]

    best = start
    for _ in range(plan.generations):
        pool = list(dict.fromkeys(mutate(best, rng) for _ in range(plan.offspring)))
        for keep, batches in zip(plan.survivors, plan.batches, strict=True):
            pool = [best, *pool] if keep == 1 else pool
            price_here = functools.partial(price, batches=batches)
            pool = sorted(pool, key=price_here)[:keep]
        best = pool[0]
    return best


def level_switch(costs: list[list[int]], budget: float):
    """The mutation that raises some units by a level and lowers others to pay for it.

    ``costs`` rise with the level. One to three times (the smaller of two draws) a
    random unit goes up, then random others go down until the total fits the budget;
    the paper pairs units of equal size, so that one down pays for one up.
    """

    def total(levels) -> int:
        return sum(row[i] for row, i in zip(costs, levels, strict=True))

    def switched(levels: list[int], rng) -> list[int]:
        raisable = [i for i, at in enumerate(levels) if at + 1 < len(costs[i])]
        if not raisable:
            return levels
        up = rng.choice(raisable)
        made = list(levels)
        made[up] += 1
        while total(made) > budget:
            lower = [i for i, at in enumerate(made) if at > 0 and i != up]
            if not lower:
                return levels
            made[rng.choice(lower)] -= 1
        return made

    def mutate(levels: Levels, rng: np.random.Generator) -> Levels:
        made = list(levels)
        for _ in range(min(rng.integers(1, 4, 2))):
            made = switched(made, rng)
        return tuple(made)

    return mutate


def filled(costs: list[list[int]], budget: float, rng: np.random.Generator) -> Levels:
    """The highest level that all units can have, then random ones go up while they fit.

    Raises:
      ValueError: The lowest levels already exceed the budget.
    """
    depth = min(map(len, costs))
    fits = [i for i in range(depth) if sum(row[i] for row in costs) <= budget]
    if not fits:
        least = sum(row[0] for row in costs)
        raise ValueError(
            f"budget of {budget:,.0f} bytes; the smallest options take {least:,.0f}"
        )
    levels = [fits[-1]] * len(costs)
    spare = budget - sum(row[fits[-1]] for row in costs)
    for i in rng.permutation(len(costs)):
        row, at = costs[i], levels[i]
        if at + 1 < len(row) and row[at + 1] - row[at] <= spare:
            spare -= row[at + 1] - row[at]
            levels[i] += 1
    return tuple(levels)


@expression
def evolve_levels(options, bits: float, plan: Evolution = Evolution()):
    """The body that searches one of several per-layer methods for each weight.

    Every option is solved once on the dense model; candidates are put together from
    those and judged by the divergence of their next-token distributions from the
    dense model's. The bytes as stored stay within ``bits`` per weight. Where only
    shapes are known, the levels the search starts from are given.
    """
    pipelines = tuple(o if isinstance(o, Pipeline) else pipeline_of(o) for o in options)

    def run(model: Model, context: Context) -> Model:
        paths = context.paths(model)
        found = measured(model, context, pipelines, _itself, ())
        for path in paths:
            found[path].sort(key=lambda pair: pair[1])
        costs = [[size for _, size in found[path]] for path in paths]
        entries = sum(weights.size(get(model.params, f"{p}.weight")) for p in paths)
        hidden = traced(found)
        rng = np.random.default_rng(0) if hidden else _generator(context.key)
        budget = bits * entries / 8
        levels = filled(costs, budget, rng)

        def build(levels: Levels, stored: bool) -> Model:
            made = {p: found[p][at][0] for p, at in zip(paths, levels, strict=True)}
            if not stored:
                made = {path: _dense(w) for path, w in made.items()}
            return with_weights(model, made)

        if not hidden:
            judge = divergence(model, context.calibration)
            fitness = lambda x, n: judge(build(x, False), n)  # noqa: E731
            levels = evolve(levels, level_switch(costs, budget), fitness, plan, rng)
        return build(levels, True)

    needs = tuple({"logits", *(n for p in pipelines for n in p.needs)})
    return marked(run, needs=needs, adaptive=True, joint=True)


@expression(needs=("logits",))
def evolve_depth(count: int, plan: Evolution = Evolution()):
    """The body that searches which ``count`` layers to leave out.

    A mutation exchanges one to three layers for others; the judge is that of
    ``evolve_levels``. Where only shapes are known, the last layers go.
    """
    check_count(count)

    def run(model: Model, context: Context) -> Model:
        depth = len(model.config.blocks())
        check_count(count, depth)
        start = (1,) * (depth - count) + (0,) * count
        build = lambda x: cut_layers(  # noqa: E731
            model, tuple(i for i in range(depth) if x[i])
        )
        if count == 0 or traced(model.params):
            return build(start)
        judge = divergence(model, context.calibration)
        rng = _generator(context.key)
        fitness = lambda x, n: judge(build(x), n)  # noqa: E731
        mutate = level_switch([[0, 1]] * depth, depth - count)
        return build(evolve(start, mutate, fitness, plan, rng))

    return marked(run, whole=True)


def divergence(model: Model, batches):
    """``judge(other, count)``: mean KL(model || other) over positions of batches."""
    data = tuple(batches)
    goals = [_log_probabilities(model, batch) for batch in data]

    def judge(other: Model, count: int):
        pairs = zip(data[:count], goals[:count], strict=True)
        return jnp.stack([_divergence(other, x, goal) for x, goal in pairs]).mean()

    return judge


@jax.jit
def _log_probabilities(model: Model, batch):
    logits = model(batch.tokens, positions=batch.positions, segments=batch.segments)
    return jax.nn.log_softmax(logits)


@jax.jit
def _divergence(model: Model, batch, goal):
    gap = goal - _log_probabilities(model, batch)
    each = (jnp.exp(goal) * gap).sum(-1)
    share = jnp.ones(each.shape) if batch.weights is None else batch.weights
    return (each * share).sum() / jnp.maximum(share.sum(), 1.0)


_dense = jax.jit(materialize)


def _itself(path, w, made, stats):
    return made


def _generator(key) -> np.random.Generator:
    """NumPy's generator for a random key: equal keys search alike."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
