"""Learned equivalences: each block's sites change so that rounding hurts it less.

An equivalence says how one site may change: ``start(ws, site, samples, key)`` gives
theta (empty: the site stays as it is), ``change(theta, params, site)`` the block's
parameters, which compute the same function for every theta. ``learn`` optimises it
together with the clipping of the weights, through rounded weights and activations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.arrays import peak, straight_through
from jaxllm.core.compose import Context, inside
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.model import Model, Params, Site, get, layer_key, put
from jaxllm.core.reconstruct import Pace, Plan, dense, learned, target
from jaxllm.core.spec import expression, marked
from jaxllm.core.walk import Seen, walk


class Equivalence(NamedTuple):
    """``start(ws, site, samples, key)`` and ``change(theta, params, site, progress)``.

    ``progress`` grows from 0 to 1 over the epochs.
    """

    start: Callable[..., dict]
    change: Callable[..., Params]


@expression
def learn(
    rounding,
    equivalence=None,
    *,
    activations=None,
    epochs: int = 20,
    rates: tuple[float, float] = (5e-3, 1e-2),
):
    """The body that learns equivalences and clipping, block by block.

    Minimises the mean squared error between the rounded block, on the inputs that the
    already changed prefix gives, and the dense block on the dense inputs (OmniQuant,
    arXiv:2308.13137, eq. 1). ``rounding`` is a parametrization of weights
    (``clipping``), ``activations`` the format of their inputs, or what is learned of it
    (``learned_range``). Gradients pass through rounding straight. ``rates`` are Adam's,
    of equivalences and of clipping; the best epoch is kept: the error never ends above
    its start.
    """
    if epochs < 1 or len(rates) != 2 or min(rates) <= 0:
        raise ValueError(f"epochs {epochs}, rates {rates}: at least 1, two above 0")
    if activations is None or isinstance(activations, ActivationFormat):
        activations = fixed_range(activations)
    pace = Pace(epochs, dict(sites=rates[0], weights=rates[1], inputs=rates[1]))

    def run(model: Model, context: Context) -> Model:
        paths = tuple(context.paths(model))
        check_inside_blocks(model, paths)
        sites = tuple(s for s in model.config.sites() if set(paths) >= {*s.consumers})
        recipe = Recipe(rounding, equivalence, activations)

        def visit(params, block, seen: Seen):
            own = in_float32(get(params, block))
            soft = recipe.inside(block, paths, sites)
            theta = soft.start(own, seen, block, context.key)
            plan = Plan(soft, seen.block)
            goals = [target(seen.block, own, *item) for item in seen.exact]
            theta, progress = learned(plan, pace, theta, own, seen, goals)
            made = _stored(soft, theta, own, progress)
            return put(params, block, as_before(made, get(params, block)))

        return walk(
            model,
            context.calibration,
            (),
            visit,
            inputs=True,
            exact=True,
            label="learn",
            monitor=context.monitor,
            wants=lambda block: any(inside(p, block) for p in paths),
        )

    return marked(run, needs=("inputs",))


def check_inside_blocks(model: Model, paths) -> None:
    """Refuse weights that no block holds (the head)."""
    blocks = [path for path, _ in model.config.blocks()]
    for path in paths:
        if not any(inside(path, block) for block in blocks):
            raise ValueError(f"{path} is in no block: only blocks are reconstructed")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is learned of a block: hashable, with paths inside the block."""

    rounding: Any
    equivalence: Any
    activations: Any
    paths: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()

    def inside(self, block: str, paths, sites) -> Recipe:
        """The same for one block's weights and sites, with local paths."""
        short = lambda path: path.removeprefix(f"{block}.")  # noqa: E731
        mine = tuple(short(p) for p in paths if inside(p, block))
        local = tuple(
            dataclasses.replace(
                s,
                consumers=tuple(map(short, s.consumers)),
                tap=short(s.tap),
                producer=s.producer and short(s.producer),
            )
            for s in sites
            if inside(s.tap, block)
        )
        return dataclasses.replace(self, paths=mine, sites=local)

    def start(self, params, seen: Seen, block: str, key) -> dict:
        """The first theta: of sites by tap, of weights and their inputs by path."""
        ws = {p: dense(params, p) for p in self.paths}
        found = {}
        if self.equivalence is not None:
            taken = seen.taps(params)
            for site in self.sites:
                own = tuple(ws[p] for p in site.consumers)
                samples = [t[site.tap] for t in taken]
                mine = layer_key(key, f"{block}.{site.tap}")
                begin = self.equivalence.call.start
                found[site.tap] = begin(own, site, samples, mine)
        clip = {p: self.rounding.call.start(w, None, None) for p, w in ws.items()}
        inputs = {p: self.activations.call.start() for p in self.paths}
        return dict(sites=found, weights=clip, inputs=inputs)

    def changed(self, theta, params, progress) -> Params:
        """The block after its equivalences, before any rounding.

        Last site first: what folds into a producer finds it dense.
        """
        for site in reversed(self.sites):
            own = theta["sites"].get(site.tap)
            if own:
                change = self.equivalence.call.change
                params = change(own, params, site, progress)
        return params

    def __call__(self, theta, params, progress) -> Params:
        """The rounded block, with gradients."""
        return self._rounded(theta, params, progress, "soft")

    def render(self, theta, params, progress) -> Params:
        """The rounded block as it is stored; the same values as the soft one."""
        return self._rounded(theta, params, progress, "render")

    def _rounded(self, theta, params, progress, how: str) -> Params:
        params = self.changed(theta, params, progress)
        of_weight = getattr(self.rounding.call, how)
        of_input = getattr(self.activations.call, how)
        for path in self.paths:
            own, inputs = theta["weights"][path], theta["inputs"][path]

            def solve(w, *_, own=own, inputs=inputs):
                return of_input(inputs, of_weight(own, w))

            w = weights.refine(get(params, f"{path}.weight"), solve, None)
            params = put(params, f"{path}.weight", w)
        return params


@functools.partial(jax.jit, static_argnums=0)
def _stored(recipe: Recipe, theta, params, progress) -> Params:
    return recipe.render(theta, params, progress)


class Inputs(NamedTuple):
    """``start()``, ``soft(theta, w)`` and ``render(theta, w)``: w behind a rounding."""

    start: Callable[..., dict]
    soft: Callable[..., Any]
    render: Callable[..., Any]


@expression
def fixed_range(format: ActivationFormat | None):
    """Inputs rounded to a format (None: left alone); nothing of it is learned."""
    soft = None if format is None else softened(format)

    def behind(format, theta, w):
        return w if format is None else weights.ActivationQuantized(w, format)

    part = functools.partial
    return Inputs(dict, part(behind, soft), part(behind, format))


@expression
def learned_range(format: ActivationFormat, start: float = 4.0):
    """Inputs rounded within sigmoid(theta) of each token's range (FlatQuant).

    One learned number for each weight, at first ``start`` (arXiv:2410.09426,
    section 3.1, learnable clipping thresholds). The format must be symmetric.
    """
    if not format.symmetric:
        raise ValueError(f"{format}: a learned range has no zero point")
    soft = softened(format)

    def behind(format, theta, w):
        share = jax.nn.sigmoid(theta["share"])
        return weights.Clipped(weights.ActivationQuantized(w, format), share)

    part = functools.partial
    begin = lambda: dict(share=jnp.asarray(start))  # noqa: E731
    return Inputs(begin, part(behind, soft), part(behind, format))


@dataclasses.dataclass(frozen=True)
class Straight(ActivationFormat):
    """The same rounding, whose gradients are those of no rounding at all."""

    @classmethod
    def of(cls, format: ActivationFormat):
        fields = dataclasses.fields(format)
        return cls(**{field.name: getattr(format, field.name) for field in fields})

    def round(self, x):
        return straight_through(super().round(x), x)


@dataclasses.dataclass(frozen=True)
class Softened(Straight):
    """The same rounding per token, with the gradients of s round(x / s).

    Rounding passes them straight; beyond a shrunk range it is the range's end that
    has them.
    """

    def round(self, x):
        wide = x.astype(jnp.float32)
        if self.symmetric:
            span = peak(jnp.abs(wide)) * self.clip
            wide = jnp.clip(wide, -span, span)
        else:
            high, low = (jnp.maximum(peak(x), 0.0) for x in (wide, -wide))
            span = (high + low) * self.clip
        scale = jnp.maximum(span, 1e-9)
        values = ActivationFormat.round(self, x).astype(jnp.float32)
        unit = straight_through(values / scale, wide / scale)
        return straight_through(values, unit * scale).astype(x.dtype)


def softened(format: ActivationFormat) -> Softened:
    """A format whose rounding has gradients; its ranges are those of whole tokens."""
    if format.block is not None:
        raise ValueError(f"{format}: inputs are rounded per token here")
    return Softened.of(format)


def in_float32(params: Params) -> Params:
    """The dense leaves in float32."""
    return jax.tree.map(
        lambda x: x if weights.compressed(x) else x.astype(jnp.float32),
        params,
        is_leaf=weights.compressed,
    )


def as_before(made, before):
    """Parameters with the dtypes of those before; a new bias has its group's."""
    if isinstance(made, dict):
        any_leaf = next((x for x in before.values() if not isinstance(x, dict)), None)
        return {k: as_before(v, before.get(k, any_leaf)) for k, v in made.items()}
    if weights.compressed(made):
        return made if weights.compressed(before) else _typed(made, str(before.dtype))
    return made.astype(before.dtype)


def _typed(w, dtype: str):
    """A weight, or an array inside one, whose dense form has another dtype."""
    if not weights.compressed(w):
        return w.astype(dtype)
    if hasattr(w, "inner"):
        return dataclasses.replace(w, inner=_typed(w.inner, dtype))
    return dataclasses.replace(w, dtype=dtype)
