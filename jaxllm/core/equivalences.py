"""Equivalences: changes of a site's weights that leave the model's function alone.

A rescaling is called as ``equivalence(weights, stats, site) -> factor`` [in]: the
shared input becomes x * factor, the consumers' rows are divided by it. ``fold`` puts
the factor, and a shift that comes before it, into the producer where that is exact;
otherwise the factor stays online.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core import weights
from jaxllm.core.model import Params, Site, get, put
from jaxllm.core.scales import Grid, projected
from jaxllm.core.spec import expression
from jaxllm.core.stats import output_energy

SMALL = 1e-5
PROBES = 64  # of the outputs of wide layers


def pooled(site: Site, values: Float[Array, "in"]) -> Float[Array, "in"]:
    """The largest value among input channels that one producer channel feeds."""
    if site.repeat == 1:
        return values
    heads = values.reshape(-1, site.repeat, site.head_dim)
    peak = heads.max(1, keepdims=True)
    return jnp.broadcast_to(peak, heads.shape).reshape(values.shape)


def row_peak(ws) -> Float[Array, "in"]:
    """Largest magnitude of each input's weights over the site's consumers."""
    return jnp.stack([jnp.abs(w).max(-1) for w in ws]).max(0)


def balance(site: Site, ws, peak: Float[Array, "in"], alpha: float):
    """s = peak^alpha / max|w|^(1 - alpha), one for each input (SmoothQuant, eq. 4)."""
    wide = jnp.maximum(pooled(site, row_peak(ws)), SMALL)
    return peak**alpha / wide ** (1 - alpha)


@expression(needs=("absmax",))
def smooth(alpha: float = 0.5):
    """SmoothQuant (arXiv:2211.10438, eq. 4): s = max|x|^alpha / max|w|^(1-alpha).

    The input is divided by s, so that activations and weights share the range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}; accepted: 0 to 1")

    def equivalence(ws, stats, site):
        peak = jnp.maximum(pooled(site, stats.absmax.value), SMALL)
        return 1 / jnp.maximum(balance(site, ws, peak, alpha), SMALL)

    return equivalence


@expression(needs=("gram", "moments"))
def searched(grid: Grid, steps: int = 20):
    """AWQ (arXiv:2306.00978, eq. 4, 5): s = E|x|^a, a in [0, 1) with the least error.

    The error is that of the consumers' outputs when W s is rounded to ``grid``,
    measured with the Gram matrix: sum of tr((W - V)T E[x xT] (W - V)), in layers of
    more than 512 outputs on random sums of them (``output_energy``). s is normalised
    by sqrt(max s min s) as in the authors' code.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}; accepted: at least 1")

    def equivalence(ws, stats, site):
        magnitude = jnp.maximum(pooled(site, stats.moments.mean_absolute), SMALL)
        h = stats.gram.mean

        def scale(a):
            s = jnp.maximum(magnitude**a, 1e-4)
            return s / jnp.sqrt(s.max() * s.min())

        def error(a):
            s = scale(a)
            total = jnp.zeros(())
            for w in ws:
                delta = w - projected(grid, w * s[:, None]) / s[:, None]
                total += output_energy(h, delta, PROBES)
            return total

        tried = jnp.arange(steps) / steps
        losses = jax.lax.map(error, tried)
        return 1 / scale(tried[losses.argmin()])

    return equivalence


def shiftable(site: Site) -> bool:
    """Whether the producer can take a constant off the site's input.

    Norms can, with a bias, and values, since the rows of the attention matrix sum to
    one. The output of ``up`` meets the gate first.
    """
    if site.producer is None or not site.exclusive:
        return False
    return site.kind != "linear" or site.head_dim > 1


def fold(
    params: Params,
    site: Site,
    factor: Float[Array, "*lead in"],
    shift: Float[Array, "in"] | None = None,
) -> Params:
    """Parameters in which the site's input is (x - ``shift``) * ``factor``.

    Consumers must be dense: a packed weight refuses, naming itself. They get a bias
    that gives the shift back; only a ``shiftable`` site takes one.
    """
    producer = site.producer if site.exclusive else None
    if shift is not None and not shiftable(site):
        raise ValueError(f"{site.tap}: no producer takes a shift")
    for path in site.consumers:
        group = get(params, path)
        w = group["weight"]
        if weights.compressed(w):
            raise TypeError(
                f"{path} is {type(w).__name__}: rescale before compressing it"
            )
        wide = w.astype(jnp.float32)
        changed = (wide / factor[..., :, None]).astype(w.dtype)
        if producer is None:
            changed = weights.Transformed(weights.Scale(factor), changed)
        group = group | {"weight": changed}
        if shift is not None:
            group["bias"] = _plus(group.get("bias"), shift @ wide, w.dtype)
        params = put(params, path, group)
    return params if producer is None else _into(params, producer, site, factor, shift)


def _plus(bias, change, dtype):
    """A bias (None: there was none) and a change, in ``dtype``."""
    old = 0.0 if bias is None else bias.astype(jnp.float32)
    return (old + change).astype(dtype)


def _into(params: Params, producer: str, site: Site, factor, shift=None) -> Params:
    """The producer's outputs less the shift, multiplied by the factor."""
    group = get(params, producer)
    if shift is not None:
        dtype = group["weight" if site.kind == "linear" else "scale"].dtype
        less = -producer_channels(site, shift)
        group = group | {"bias": _plus(group.get("bias"), less, dtype)}
    if site.kind == "linear":
        kept = producer_channels(site, factor)
        w = group["weight"]
        if weights.compressed(w):
            raise TypeError(f"{producer} is {type(w).__name__}: rescale first")
        changed = {"weight": _times(w, kept[..., None, :])}
    else:
        kept, one = factor, float(site.kind == "norm_plus_one")
        scale = group["scale"]
        wide = (scale.astype(jnp.float32) + one) * kept - one
        changed = {"scale": wide.astype(scale.dtype)}
    if "bias" in group:
        changed["bias"] = _times(group["bias"], kept)
    return put(params, producer, group | changed)


def _times(x, factor):
    """The product in float32, stored like ``x``."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def producer_channels(site: Site, factor):
    """One factor per producer channel: repeated heads share theirs."""
    if site.repeat == 1:
        return factor
    return factor.reshape(-1, site.repeat, site.head_dim)[:, 0].reshape(-1)


def input_channels(site: Site, values):
    """The producer's channels as the consumers see them: one head's serve several."""
    if site.repeat == 1:
        return values
    heads = values.reshape(-1, 1, site.head_dim)
    return jnp.repeat(heads, site.repeat, 1).ravel()
