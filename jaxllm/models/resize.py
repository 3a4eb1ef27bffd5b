"""Configurations of smaller models: fewer units in a part, channels, or layers."""

from __future__ import annotations

import dataclasses

from jaxllm.models.config import Layer, MoE, Norm


def with_units(config, counts: dict[str, int]):
    """The configuration with ``counts[part]`` units in each named part."""
    layers = list(config.layers)
    for path, count in counts.items():
        _, index, part = path.split(".", 2)
        layers[int(index)] = _resized(layers[int(index)], part, count)
    return dataclasses.replace(config, layers=tuple(layers))


def _resized(layer: Layer, part: str, count: int) -> Layer:
    if part == "attn":
        a = layer.attention
        heads = a.heads // a.kv_heads * count
        attention = dataclasses.replace(a, heads=heads, kv_heads=count)
        return dataclasses.replace(layer, attention=attention)
    ffn = layer.ffn
    if isinstance(ffn, MoE):
        shared = dataclasses.replace(ffn.shared, hidden=count)
        ffn = dataclasses.replace(ffn, shared=shared)
    else:
        ffn = dataclasses.replace(ffn, hidden=count)
    return dataclasses.replace(layer, ffn=ffn)


def with_width(config, width: int):
    """The configuration with a narrower residual stream.

    Each norm's eps grows by old / new width: with its scale times the root of that
    (the caller's part), a norm gives what the wide one gave of channels that were zero.
    """
    grown = config.width / width

    def norm(n: Norm | None) -> Norm | None:
        return None if n is None else dataclasses.replace(n, eps=n.eps * grown)

    layers = tuple(dataclasses.replace(x, norm=norm(x.norm)) for x in config.layers)
    return dataclasses.replace(
        config, width=width, layers=layers, norm=norm(config.norm)
    )


def with_layers(config, kept: tuple[int, ...]):
    """The configuration with the layers ``kept`` only, in this order."""
    layers = tuple(config.layers[i] for i in kept)
    return dataclasses.replace(config, layers=layers)
