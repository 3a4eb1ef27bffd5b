"""The pipeline of an equivalence method: a rescaling of every site of a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.compose import FEW_TOKENS, Context, inside
from jaxllm.core.equivalences import fold
from jaxllm.core.model import Model, Site, get
from jaxllm.core.spec import expression
from jaxllm.core.walk import Seen, walk


@expression
def rescale(equivalence, *, sites: str = "all"):
    """The body of an equivalence method: every site with selected consumers.

    ``sites`` "norm" takes those whose producer is a norm, "all" also those behind a
    linear map. A site whose factor no producer can take is left alone.
    """
    if sites not in ("all", "norm"):
        raise ValueError(f"sites {sites!r}; accepted: 'all', 'norm'")
    linear = sites == "all"

    def run(model: Model, context: Context) -> Model:
        chosen = set(context.paths(model))
        found = [
            site
            for site in model.config.sites()
            if chosen.issuperset(site.consumers)
            and site.producer is not None
            and site.exclusive
            and (linear or site.kind != "linear")
        ]

        def visit(params, block, seen: Seen):
            for site in found:
                if inside(site.consumers[0], block):
                    stats = seen.stats[site.tap]
                    params = _rescaled(equivalence, params, site, stats)
            return params

        wants = lambda b: any(inside(s.consumers[0], b) for s in found)  # noqa: E731
        return walk(
            model,
            context.calibration,
            equivalence.needs,
            visit,
            label="rescale",
            monitor=context.monitor,
            wants=wants,
        )

    return run


def _rescaled(equivalence, params, site: Site, stats):
    ws = tuple(get(params, f"{p}.weight") for p in site.consumers)
    for path, w in zip(site.consumers, ws, strict=True):
        if weights.compressed(w):
            raise TypeError(f"{path} is {type(w).__name__}: rescale before compressing")
    factor = _factor(equivalence, site.kindred, ws, stats)
    return fold(params, site, factor)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _factor(equivalence, site: Site, ws, stats):
    dense = tuple(w.astype(jnp.float32) for w in ws)
    if dense[0].ndim == 2:
        return equivalence(dense, stats, site)
    one = lambda ws, stats: equivalence(ws, stats, site)  # noqa: E731
    return jax.vmap(one)(dense, stats.pooled(FEW_TOKENS))
