"""Migration: centre and shrink the outlier channels of activations (OS+).

The shared input of a site becomes (x - z) / s; its producer takes z and s, its
consumers give them back.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.compose import Context, inside
from jaxllm.core.equivalences import SMALL, fold, pooled, shiftable
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.model import Model, Site, get
from jaxllm.core.spec import expression, marked
from jaxllm.core.walk import Seen, walk


@expression
def migrate(
    solve, activations: ActivationFormat | None, *, steps: int = 50, shift: bool = True
):
    """The body of Outlier Suppression+ (arXiv:2304.09145, section 4).

    z = (max x + min x) / 2 per channel (eq. 2) where a producer can take it,
    s = max(1, max|x - z| / t) (eq. 5), and t, one number per site, has the least
    error |Q((x - z) / s) Q(s W) - (x - z) W|^2 among ``steps`` shares of max|x - z|.
    ``solve`` is Q of weights, ``activations`` Q of inputs (None: exact). The error is
    that of the site's linear maps, where the paper goes on through the attention and
    the gate. Sites of experts, or without a producer, are left alone.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}; accepted: at least 1")
    if solve.needs:
        raise ValueError(f"{solve!r} needs {solve.needs}: migration rounds without")
    plan = (solve, activations, steps, shift)

    def run(model: Model, context: Context) -> Model:
        chosen = set(context.paths(model))
        sites = [s for s in model.config.sites() if _movable(model.params, s, chosen)]

        def visit(params, block, seen: Seen):
            mine = [s for s in sites if inside(s.tap, block)]
            batches = seen.taps(get(params, block))
            for site in mine:
                tap = site.tap.removeprefix(f"{block}.")
                found = _found(plan, params, site, [b[tap] for b in batches])
                params = fold(params, site, *found)
            return params

        return walk(
            model,
            context.calibration,
            (),
            visit,
            inputs=True,
            label="migrate",
            monitor=context.monitor,
            wants=lambda block: any(inside(s.tap, block) for s in sites),
        )

    return marked(run, needs=("inputs",))


def _movable(params, site: Site, chosen: set[str]) -> bool:
    if not (site.producer and site.exclusive and chosen.issuperset(site.consumers)):
        return False
    for path in site.consumers:
        w = get(params, f"{path}.weight")
        if weights.compressed(w):
            raise TypeError(f"{path} is {type(w).__name__}: migrate before compressing")
    return w.ndim == 2


def _found(plan, params, site: Site, samples):
    """(1 / s, z) of a site; z is None where no producer takes it."""
    moves = plan[3] and shiftable(site)
    shift, peak = centred(site, samples, moves)
    ws = tuple(get(params, f"{p}.weight").astype(jnp.float32) for p in site.consumers)
    errors = sum(_errors(plan, ws, peak, s.x - shift[None], s.weights) for s in samples)
    factor = 1 / _scale(peak, (jnp.argmin(errors) + 1) / plan[2])
    return factor, shift if moves else None


def centred(site: Site, samples, shift: bool):
    """z and max|x - z| per input channel, equal for repeated heads.

    z is the middle of the channel's range over all ``samples``, or zero.
    """
    high = pooled(site, jnp.stack([_range(s.x, s) for s in samples]).max(0))
    low = -pooled(site, jnp.stack([_range(-s.x, s) for s in samples]).max(0))
    middle = (high + low) / 2 if shift else jnp.zeros_like(high)
    return middle, jnp.maximum(jnp.maximum(high - middle, middle - low), SMALL)


def _range(x, samples):
    """The largest value of each channel over tokens that count."""
    return jnp.where(samples.weights[:, None] > 0, x, -jnp.inf).max(0)


def _scale(peak, share):
    return jnp.maximum(peak / (share * peak.max()), 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _errors(plan, ws, peak, x, share):
    """The squared output error of one batch for each candidate t, [steps]."""
    solve, activations, steps, _ = plan
    rounded = lambda v: v if activations is None else activations.round(v)  # noqa: E731
    exact = tuple(x @ w for w in ws)

    def error(index):
        s = _scale(peak, (index + 1) / steps)
        small, total = rounded(x / s[None]), 0.0
        for w, y in zip(ws, exact, strict=True):
            made = weights.materialize(solve(w * s[:, None], None))
            total += (((small @ made - y) ** 2).sum(-1) * share).sum()
        return total

    return jax.lax.map(error, jnp.arange(steps))
