"""Static ranges of activations: one per weight, found before it is used.

The rules are those of ``scales``: what they read are the calibration inputs, each
token as important as its weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import straight_through
from jaxllm.core.compose import Context, compress, inside
from jaxllm.core.formats import TINY, ActivationFormat, MixedActivation
from jaxllm.core.learned import Inputs, check_inside_blocks
from jaxllm.core.model import Model, get, put
from jaxllm.core.scales import absmax, per_entry
from jaxllm.core.spec import expression, marked
from jaxllm.core.stats import Samples
from jaxllm.core.walk import Seen, walk
from jaxllm.core.weights import StaticInput, Transformed, Weight
from jaxllm.core.weights.activation import around_input

HALVINGS = 30


@expression
def percentile(share: float = 0.9999):
    """The range that holds this share of the values; what is beyond becomes its end.

    The share of |w| for symmetric formats, else as much is cut off at either end.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share}; accepted: 0 < share <= 1")
    whole = absmax()

    def rule(block, format, importance):
        if format.symmetric:
            peak = _quantile(jnp.abs(block), importance, share)
            return whole(jnp.clip(block, -peak, peak), format, importance)
        low = -_quantile(-block, importance, (1 + share) / 2)
        high = _quantile(block, importance, (1 + share) / 2)
        return whole(jnp.clip(block, low, high), format, importance)

    return rule


def _quantile(values, importance, share: float):
    """The least of the values [1, out] up to which that share of importance lies.

    By bisection: a sort of millions of values takes far longer.
    """
    importance = jnp.broadcast_to(per_entry(importance), values.shape)
    goal = share * importance.sum(0)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = jnp.where(values <= middle[None], importance, 0.0).sum(0)
        enough = below >= goal
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    ends = values.min(0), values.max(0)
    high = jax.lax.fori_loop(0, HALVINGS, halve, ends)[1]
    return jnp.where(values <= high[None], values, -jnp.inf).max(0, keepdims=True)


@expression
def static_inputs(format: ActivationFormat, rule=absmax()):
    """The body that rounds the inputs of finished weights to ranges known beforehand.

    Each range is what ``rule`` (``absmax``, ``percentile``, ``mse``) makes of the
    weight's inputs over the calibration set, after online transforms and with the
    inputs of all blocks before rounded. All experts of a layer share one range.
    """
    check_static(format)

    def run(model: Model, context: Context) -> Model:
        paths = context.paths(model)
        check_inside_blocks(model, paths)
        taps = {p: s.tap for s in model.config.sites() for p in s.consumers}

        def visit(params, block, seen: Seen):
            batches = seen.taps(get(params, block))
            found: dict[Any, Any] = {}
            for path in (p for p in paths if inside(p, block)):
                tap = taps[path].removeprefix(f"{block}.")
                w, samples = get(params, f"{path}.weight"), [b[tap] for b in batches]
                ops = ops_before(w)
                key = path if ops else tap
                if key not in found:
                    found[key] = found_range(format, rule, ops, samples)
                made = with_range(w, found[key], format, samples[0].x.shape[:-2])
                params = put(params, f"{path}.weight", made)
            return params

        return walk(
            model,
            context.calibration,
            (),
            visit,
            inputs=True,
            label="ranges",
            monitor=context.monitor,
            wants=lambda block: any(inside(p, block) for p in paths),
        )

    return marked(run, needs=("inputs",))


def rounded(solve, format: ActivationFormat | None, static: bool = False) -> list:
    """The bodies that round weights by ``solve`` and inputs to ``format`` (None: not).

    Inputs have a range per token, or ``static`` ones.
    """
    if not static:
        return [compress(solve, activations=format)]
    if format is None:
        raise ValueError("static ranges of activations need their bits, got None")
    return [compress(solve), static_inputs(format)]


def check_static(format: ActivationFormat) -> None:
    """Refuse formats that say how a range follows from a token."""
    if isinstance(format, MixedActivation) or format.clip != 1:
        raise ValueError(f"{format}: a static range has one width and a rule, no clip")


def ops_before(w) -> tuple[Any, ...]:
    """The online transforms that a weight's input goes through, first to last."""
    return (w.op, *ops_before(w.inner)) if isinstance(w, Transformed) else ()


def with_range(w, grid, format: ActivationFormat, lead: tuple[int, ...] = ()) -> Weight:
    """The weight with its input rounded on ``grid``: (scale, zero or None) [blocks].

    Experts, on axes ``lead`` in front of the weight's, have the same range.
    """
    scale, zero = grid
    spread = lambda v: jnp.broadcast_to(v, (*lead, *v.shape)) if lead else v  # noqa: E731
    zero = None if zero is None else spread(zero.astype(jnp.uint8))
    wrap = lambda inner: StaticInput(inner, spread(scale), zero, format)  # noqa: E731
    return around_input(w, wrap)


def found_range(format: ActivationFormat, rule, ops, samples: list[Samples]):
    """(scale, zero or None) [blocks] that ``rule`` gives the inputs of all batches."""
    x = jnp.concatenate([s.x for s in samples], -2)
    weights = jnp.concatenate([s.weights for s in samples], -1)
    return _range(format, rule, ops, x, weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _range(format: ActivationFormat, rule, ops, x, weights):
    for op in ops:
        apply = lambda op, x: op.apply(x)  # noqa: E731
        x = (jax.vmap(apply) if x.ndim > 2 else apply)(op, x)
    x = jnp.where(weights[..., None] > 0, x, 0.0).reshape(-1, x.shape[-1])
    importance = jnp.broadcast_to(weights.reshape(-1, 1), x.shape).astype(jnp.float32)
    size = format.block or x.shape[-1]

    def blocks(values):
        """[values of a block, blocks]; what fills a short one counts nothing."""
        filled = jnp.pad(values, ((0, 0), (0, -values.shape[-1] % size)))
        each = jnp.moveaxis(filled.reshape(len(values), -1, size), 1, -1)
        return each.reshape(-1, each.shape[-1])

    return rule(blocks(x), format.format, blocks(importance))


@expression
def static_range(format: ActivationFormat):
    """Inputs rounded to a learned range for all tokens: theta = log of its ends.

    ``high`` (and ``low``, of the negative end, where ``format`` has a zero point) are
    [blocks]; logarithms keep the ends on their sides of zero at one rate for all.
    """
    check_static(format)
    top = format.format.codes - 1

    def ends(theta):
        """Scale and zero point with gradients, the values as they are stored."""
        high = jnp.exp(theta["high"])
        if format.symmetric:
            return high / format.format.largest, None
        scale = (high + jnp.exp(theta["low"])) / top
        zero = jnp.exp(theta["low"]) / scale
        return scale, straight_through(jnp.round(zero), zero)

    def soft(theta, w):
        scale, zero = ends(theta)
        return StaticInput(w, scale, zero, format)

    def render(theta, w):
        scale, zero = ends(theta)
        zero = None if zero is None else zero.astype(jnp.uint8)
        return StaticInput(w, scale, zero, format)

    return Inputs(dict, soft, render)


def log_ends(format: ActivationFormat, scale, zero) -> dict[str, jax.Array]:
    """The theta of ``static_range`` that stands for a scale and zero point."""
    if zero is None:
        return dict(high=jnp.log(scale * format.format.largest))
    high = scale * (format.format.codes - 1 - zero)
    log = lambda x: jnp.log(jnp.maximum(x, TINY))  # noqa: E731
    return dict(high=log(high), low=log(scale * zero))
