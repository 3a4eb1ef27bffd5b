"""Slicing: the same model with units, channels of the stream, or layers cut out.

What is cut is really gone: the result is a dense model of smaller shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.core.model import Model, Params, Units, get, put
from jaxllm.core.weights import compressed

Kept = Mapping[str, Int[Array, "kept"]]


def dense(params: Params, path: str) -> Array:
    """The weight at a path, which must still be an array."""
    w = get(params, f"{path}.weight")
    if compressed(w):
        raise TypeError(f"{path} is {type(w).__name__}: cut before compressing it")
    return w


def channels(units: Units, size: int, kept: Int[Array, "kept"]) -> Int[Array, "_"]:
    """The channels that units ``kept`` own on an axis of ``size`` channels."""
    run = size // units.count
    return (kept[:, None] * run + jnp.arange(run)[None]).reshape(-1)


def cut_units(model: Model, kept: Kept) -> Model:
    """Keep, of each part named in ``kept``, the units with these (sorted) numbers."""
    params = model.params
    for units in model.config.units():
        if units.path not in kept:
            continue
        chosen = kept[units.path]
        for path in units.outputs:
            index = channels(units, dense(params, path).shape[-1], chosen)
            params = put(params, path, _cut(get(params, path), index, -1))
        w = dense(params, units.input)
        index = channels(units, w.shape[-2], chosen)
        params = put(params, f"{units.input}.weight", jnp.take(w, index, -2))
    counts = {path: len(chosen) for path, chosen in kept.items()}
    return model.replace(params=params, config=model.config.with_units(counts))


def _cut(group: Params, index, axis: int) -> Params:
    """Weight, bias, scale ... of one group, along the channels' axis of each."""
    return {name: jnp.take(x, index, axis) for name, x in group.items()}


def cut_width(model: Model, kept: Int[Array, "kept"]) -> Model:
    """Keep the residual stream's channels ``kept``; the others are taken to be zero.

    Norms still divide by the mean over the old width (folded into scale and eps), so
    that a channel that was zero can go without any change of the logits. RMS norms
    only: a layer norm's mean would change.
    """
    residual, params = model.config.residual(), model.params
    wide, narrow = model.config.width, len(kept)
    norms = {n: k for (n, _), k in zip(residual.readers, residual.kinds, strict=True)}
    norms |= dict.fromkeys(filter(None, residual.post_norms), residual.kinds[0])
    for path, kind in norms.items():
        if path is None:
            continue
        if kind == "layer":
            raise ValueError(f"{path} is a layer norm: only RMS norms can be narrowed")
        one = float(kind == "rms_plus_one")
        scale = jnp.take(get(params, path)["scale"], kept)
        scale = (scale + one) * (wide / narrow) ** 0.5 - one
        params = put(params, f"{path}.scale", scale)
    readers = dict.fromkeys(p for _, paths in residual.readers for p in paths)
    for path in readers | {residual.embed: None}:
        w = jnp.take(dense(params, path), kept, -2)
        params = put(params, f"{path}.weight", w)
    for path in residual.writers:
        dense(params, path)
        params = put(params, path, _cut(get(params, path), kept, -1))
    if residual.positions is not None:
        group = get(params, residual.positions)
        params = put(params, residual.positions, _cut(group, kept, -1))
    return model.replace(params=params, config=model.config.with_width(narrow))


def cut_layers(model: Model, kept: tuple[int, ...]) -> Model:
    """Keep the layers with these numbers, in this order."""
    paths = [path for path, _ in model.config.blocks()]
    stem = paths[0].rpartition(".")[0]
    layers = {str(i): get(model.params, paths[j]) for i, j in enumerate(kept)}
    params = put(model.params, stem, layers)
    return model.replace(params=params, config=model.config.with_layers(kept))
