"""Transforms: pure functions from model to model, and how they compose.

``compress`` is the pipeline of a per-layer method (split -> solve -> correct), lifted
over the model by the walk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxllm.core import weights
from jaxllm.core.batch import counted
from jaxllm.core.formats import ActivationFormat, Log2
from jaxllm.core.gradients import squared_gradients
from jaxllm.core.model import Model, get, layer_key, put, select
from jaxllm.core.spec import Expression, expression, marked, walk_expressions
from jaxllm.core.stats import Stats, abstract_stats
from jaxllm.core.walk import Monitor, Seen, walk
from jaxllm.core.weights import Sum, materialize, refine
from jaxllm.core.weights.activation import round_input

FEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Context:
    """What a transform reads besides the model: data, key, selection, monitor."""

    calibration: Any = None
    key: Any = None
    narrowed: tuple[tuple[str, ...], ...] = ()
    monitor: Monitor | None = None

    def paths(self, model: Model) -> tuple[str, ...]:
        """The selected weights: the model's linears unless narrowed."""
        chosen = model.config.linears()
        if self.narrowed:
            chosen = (*chosen, model.config.head_path)
        for patterns in self.narrowed:
            chosen = select(chosen, patterns)
        return chosen


@dataclasses.dataclass(frozen=True, repr=False)
class Transform(Expression):
    """``transform(model, calibration=None, key=None) -> Model``.

    Its fields are its spec; the result's history ends with it. ``calibration`` is a
    iterable of ``Batch``; it is required when the transform needs statistics.
    """

    def __call__(self, model, calibration=None, key=None, *, monitor=None) -> Model:
        if self.needs and calibration is None:
            raise ValueError(
                f"{self!r} needs calibration data ({', '.join(self.needs)})"
            )
        if self.needs:
            calibration = counted(calibration)
        key = jax.random.key(0) if key is None else key
        return self.apply(model, Context(calibration, key, (), monitor))

    def apply(self, model: Model, context: Context) -> Model:
        """Run the body and add this spec to the history."""
        made = self.call(model, context)
        spec = self
        for patterns in reversed(context.narrowed):
            spec = where(patterns if len(patterns) > 1 else patterns[0], spec)
        return made.replace(history=model.history + spec)


class _Group(Transform):
    """A transform made of transforms: its members write the history."""

    def apply(self, model: Model, context: Context) -> Model:
        return self.call(model, context)


transform = functools.partial(expression, kind=Transform)


@functools.partial(expression, kind=_Group)
def compose(*transforms):
    """One transform that applies others from first to last."""
    _check_transforms(transforms)

    def run(model: Model, context: Context) -> Model:
        for i, step in enumerate(transforms):
            key = jax.random.fold_in(context.key, i)
            monitor = context.monitor
            monitor = None if monitor is None else monitor.scoped(f"{i}-{step.name}")
            here = dataclasses.replace(context, key=key, monitor=monitor)
            model = step.apply(model, here)
        return model

    return run


@functools.partial(expression, kind=_Group)
def where(pattern, transform):
    """A transform narrowed to the weights that match ``pattern`` (or several).

    ``layers.*.mlp`` covers everything below it; a pattern that matches nothing is an
    error that lists the nearest paths.
    """
    _check_transforms((transform,))
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)

    def run(model: Model, context: Context) -> Model:
        narrowed = dataclasses.replace(context, narrowed=(*context.narrowed, patterns))
        narrowed.paths(model)
        for part in walk_expressions(transform):
            if getattr(part.call, "whole", False):
                raise ValueError(
                    f"{part!r} changes the whole model: it cannot be narrowed"
                )
        return transform.apply(model, narrowed)

    return run


def _check_transforms(items) -> None:
    for item in items:
        if not isinstance(item, Transform):
            raise TypeError(f"{item!r} is not a transform")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What happens to one weight: (w, stats, key) -> weight.

    ``split(w, stats, key)`` takes a part out before ``solve(w, stats, key, support)``,
    ``correct(error, stats, key)`` mends what the solver left, ``activations`` rounds
    the input. Without ``solve`` the weight stays as it is.
    """

    solve: Any = None
    split: Any = None
    correct: Any = None
    activations: ActivationFormat | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        parts = (self.solve, self.split, self.correct)
        return tuple(sorted({n for p in parts if p is not None for n in p.needs}))

    def __call__(self, w, stats, key):
        made = w
        if self.solve is not None or self.split is not None:
            made = refine(w, functools.partial(self._dense, key), stats)
        if self.correct is not None:
            error = materialize(w) - materialize(made)
            made = _added(made, self.correct(error, stats, key))
        return made if self.activations is None else round_input(made, self.activations)

    def _dense(self, key, dense, stats, support):
        if self.split is None:
            return self.solve(dense, stats, key, support)
        kept = self.split(dense, stats, key)
        rest = dense - materialize(kept).astype(dense.dtype)
        main = rest if self.solve is None else self.solve(rest, stats, key, support)
        return Sum((main, kept))


@expression
def compress(solve=None, *, split=None, correct=None, activations=None):
    """The body of a per-layer method: a ``Pipeline`` for every selected weight."""
    pipeline = Pipeline(solve, split, correct, activations)

    def run(model: Model, context: Context) -> Model:
        paths = context.paths(model)
        return compress_each(model, context, dict.fromkeys(paths, pipeline))

    return marked(run, pipeline=pipeline)


def compress_each(model: Model, context: Context, each: dict[str, Pipeline]) -> Model:
    """Each path through its own pipeline, in one walk."""
    wanted = {path: pipeline.needs for path, pipeline in each.items()}
    needs, found = _statistics(model, context, wanted)
    for pipeline in dict.fromkeys(each.values()):
        _check_fit(pipeline, model, [p for p, own in each.items() if own == pipeline])

    def visit(params, block, seen: Seen):
        for path, pipeline in each.items():
            if inside(path, block):
                w = get(params, f"{path}.weight")
                stats, key = found(seen, path), layer_key(context.key, path)
                made = _solved(pipeline, w, stats, key)
                params = put(params, f"{path}.weight", made)
        return params

    wants = lambda block: any(inside(p, block) for p in each)  # noqa: E731
    return walk(
        model,
        context.calibration,
        needs,
        visit,
        label="compress",
        monitor=context.monitor,
        wants=wants,
    )


def _statistics(model: Model, context: Context, each: dict[str, tuple[str, ...]]):
    """What the walk collects, and a function (seen, path) -> statistics or None.

    ``each`` names what every weight needs.

    Squared gradients belong to a weight, not to its input: one pass brings them
    before the walk.
    """
    taps = {p: s.tap for s in model.config.sites() for p in s.consumers}
    total = {name for needs in each.values() for name in needs}
    walked = tuple(sorted(total - {"fisher"}))
    sloped = tuple(p for p, needs in each.items() if "fisher" in needs)
    slopes = squared_gradients(model, context.calibration, sloped) if sloped else {}

    def found(seen: Seen, path: str) -> Stats | None:
        if not each[path]:
            return None
        items = dict(seen.stats[taps[path]].items) if walked else {}
        return Stats(items | ({"fisher": slopes[path]} if path in slopes else {}))

    return walked, found


def total_needs(pipelines) -> tuple[str, ...]:
    """Statistics that any of the pipelines reads."""
    return tuple(sorted({name for p in pipelines for name in p.needs}))


def measured(model: Model, context: Context, pipelines, loss, needs) -> dict:
    """For each path, (loss, bytes) of each pipeline; the model stays as it is.

    ``loss(path, w, made, stats)`` reads the statistics that ``needs`` names besides
    those of the pipelines.
    """
    paths = context.paths(model)
    total = tuple(sorted({*needs, *total_needs(pipelines)}))
    walked, lookup = _statistics(model, context, dict.fromkeys(paths, total))
    found: dict[str, list] = {}

    def visit(params, block, seen: Seen):
        for path in (p for p in paths if inside(p, block)):
            w, stats = get(params, f"{path}.weight"), lookup(seen, path)
            key = layer_key(context.key, path)
            made = [_solved(p, w, stats, key) for p in pipelines]
            prices = [loss(path, w, m, stats) for m in made]
            sizes = [weights.nbytes(m) for m in made]
            found[path] = [*zip(prices, sizes, strict=True)]
        return params

    wants = lambda block: any(inside(p, block) for p in paths)  # noqa: E731
    silent = Monitor(progress=context.monitor is not None and context.monitor.progress)
    walk(
        model,
        context.calibration,
        walked,
        visit,
        label="measure",
        monitor=silent,
        wants=wants,
    )
    return found


def _added(w, term) -> Sum:
    return Sum((*w.terms, term)) if isinstance(w, Sum) else Sum((w, term))


def inside(path: str, block: str) -> bool:
    """Whether a weight belongs to a block (the head is a block of its own)."""
    return path == block or path.startswith(block + ".")


@functools.partial(jax.jit, static_argnums=0)
def _solved(pipeline: Pipeline, w, stats, key):
    """One layer, compiled once per pipeline and structure; experts share a program."""
    if jax.eval_shape(materialize, w).ndim == 2:
        return pipeline(w, stats, key)
    count = jax.tree.leaves(w)[0].shape[0]
    stats = None if stats is None else stats.pooled(FEW_TOKENS)
    return jax.vmap(pipeline)(w, stats, jax.random.split(key, count))


def _check_fit(pipeline: Pipeline, model: Model, paths) -> None:
    """Trace every distinct layer once, so that a misfit is an error before compute."""
    seen = set()
    for path in paths:
        w = get(model.params, f"{path}.weight")
        leaves, tree = jax.tree.flatten(w)
        signature = tree, tuple((x.shape, x.dtype) for x in leaves)
        if signature in seen:
            continue
        seen.add(signature)
        dense = jax.eval_shape(materialize, w)
        needs = pipeline.needs
        stats = abstract_stats(needs, dense.shape) if needs else None
        run = functools.partial(_solved, pipeline)
        try:
            jax.eval_shape(run, w, stats, jax.random.key(0))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None


@expression
def cached(format: ActivationFormat, *, rotate: bool = False):
    """The body that stores keys and values in a number format.

    ``rotate`` turns queries and keys by a Hadamard matrix after the rotary embedding,
    which leaves their products alone and spreads the outliers of keys.
    """

    def run(model: Model, context: Context) -> Model:
        return model.replace(config=model.config.with_cache(format, rotate))

    return marked(run, whole=True)


@expression
def rounded_softmax(format: Log2):
    """The body that rounds the probabilities of attention to a number format."""

    def run(model: Model, context: Context) -> Model:
        return model.replace(config=model.config.with_probabilities(format))

    return marked(run, whole=True)


@transform
def merge_adapters():
    """Trained parts added into their weights.

    Packed weights beside adapters become dense; those whose scales were trained stay
    packed.
    """

    def run(model: Model, context: Context) -> Model:
        for path in context.paths(model):
            w = get(model.params, f"{path}.weight")
            params = put(model.params, f"{path}.weight", weights.merge(w))
            model = model.replace(params=params)
        return model

    return run


@expression
def sequence(*bodies):
    """Bodies one after the other, as one method."""

    def run(model: Model, context: Context) -> Model:
        for i, body in enumerate(bodies):
            monitor = context.monitor
            monitor = None if monitor is None else monitor.scoped(str(i))
            key = jax.random.fold_in(context.key, i)
            model = body(model, dataclasses.replace(context, key=key, monitor=monitor))
        return model

    return run


def plan(step: Transform, model: Model, calibration=None) -> Model:
    """The shapes that a transform would give (leaves are ``ShapeDtypeStruct``).

    Nothing is computed; misfits raise as they would in the real run.
    """
    run = lambda p: step(model.replace(params=p), calibration)  # noqa: E731
    return jax.eval_shape(run, model.params)
