"""compressed-tensors: ``pack-quantized`` codes and ``int-quantized`` int8 with inputs.

pack-quantized: ``weight_packed`` is a stream of bits along the inputs [out, words],
``weight_zero_point`` one along the outputs, ``weight_scale`` [out, groups], and
``weight_shape``. int-quantized: ``weight`` is int8. Each group of ``config_groups``
has the scheme of the modules that its ``targets`` name, the most specific one where
several do: layers may differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.core.formats import ActivationFormat
from jaxllm.models.exchange.affine import Affine, Scheme, Stored, exact
from jaxllm.models.exchange.packing import (
    Field,
    Packing,
    Settings,
    check_settings,
    setting,
)
from jaxllm.models.exchange.words import from_words, to_words, word_count
from jaxllm.models.hub.safetensors import Tensor

PACKED, INTEGERS = "pack-quantized", "int-quantized"
WEIGHTS = dict(
    type=("int",),
    strategy=("group", "channel"),
    num_bits=tuple(range(2, 9)),
    dynamic=(False,),
    actorder=(None, False, "weight", "static"),
    block_structure=(None,),
)
INPUTS = dict(
    type=("int",),
    strategy=("token",),
    symmetric=(True,),
    dynamic=(True,),
    num_bits=tuple(range(2, 9)),
)


class CompressedTensors(Packing):
    """``quant_method`` compressed-tensors.

    Inputs are rounded per token as the reader does it: by absmax over half the number
    of codes there, over the largest code here.
    """

    name = "compressed-tensors"
    key = "weight_scale"
    accepts = (
        "integers of 2 to 8 bits with one scale per output or per group of a size that "
        "divides the inputs; inputs as computed or in symmetric integers per token"
    )

    def refusal(self, scheme: Scheme) -> str | None:
        s = scheme
        if s.ordered:
            return "has its inputs in another order"
        if s.block is not None and s.features % s.block:
            return f"has {s.features} inputs in groups of {s.block}"
        if s.inputs is not None and s.inputs != ActivationFormat(s.inputs.bits):
            return f"rounds its inputs as {s.inputs!r}"
        return None

    def doubts(self, stored: Stored) -> str | None:
        kind = stored.scheme.dtype
        if not exact(stored.scale, jnp.dtype(kind)):
            return f"has scales outside {kind}, the type of its values"
        return None

    def fields(self, scheme: Scheme, settings: Settings) -> Mapping[str, Field]:
        s, grid = scheme, (scheme.outputs, scheme.groups)
        kind = jnp.dtype(s.dtype)  # readers compute in the type of the scales
        scales = Field(kind, grid, lambda stored: stored.scale.T.astype(kind))
        if _format(s) == INTEGERS:
            signed = lambda stored: (stored.codes.T ^ 128).view(np.int8)  # noqa: E731
            whole = (s.outputs, s.features)
            return {"weight": Field(np.int8, whole, signed), "weight_scale": scales}
        codes = lambda stored: to_words(stored.codes.T, s.bits)  # noqa: E731
        zeros = lambda stored: to_words(stored.zero.T, s.bits, 0)  # noqa: E731
        shape = lambda stored: np.array([s.outputs, s.features])  # noqa: E731
        wide = (s.outputs, word_count(s.features, s.bits))
        high = (word_count(s.outputs, s.bits), s.groups)
        out = {"weight_packed": Field(np.int32, wide, codes), "weight_scale": scales}
        if not s.symmetric:
            out["weight_zero_point"] = Field(np.int32, high, zeros)
        return out | {"weight_shape": Field(np.int64, (2,), shape)}

    def settings(
        self, modules: Mapping[str, Stored], dense: tuple[str, ...]
    ) -> dict[str, Any]:
        kind = lambda name: _group(modules[name].scheme)  # noqa: E731
        groups: list[tuple[dict, list[str]]] = []
        for name in modules:
            mine = next((g for g in groups if g[0] == kind(name)), None)
            if mine is None:
                groups.append((kind(name), [name]))
            else:
                mine[1].append(name)
        formats = {group["format"] for group, _ in groups}
        named = lambda found: ["Linear"] if len(groups) == 1 else found  # noqa: E731
        return dict(
            quant_method=self.name,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed",
            config_groups={
                f"group_{i}": {"targets": named(found)} | group
                for i, (group, found) in enumerate(groups)
            },
            ignore=list(dense),
        )

    def reader(self, settings: Settings) -> Callable[[str, int, int], Scheme]:
        accepted = dict(
            quantization_status=("compressed", "frozen"),
            format=(PACKED, INTEGERS, "mixed-precision"),
            kv_cache_scheme=(None,),
        )
        check_settings(settings, accepted)
        groups = setting(settings, "config_groups").values()
        found = {t: _facts(g) for g in groups for t in setting(g, "targets")}

        def scheme_for(name: str, features: int, outputs: int) -> Scheme:
            targets = sorted((t for t in found if _names(t, name)), key=_breadth)
            if not targets:
                message = f"quantization_config: no group has the target {name!r}"
                raise ValueError(message)
            bits, symmetric, block, inputs = found[targets[0]]
            return Scheme(bits, symmetric, block, features, outputs, inputs=inputs)

        return scheme_for

    def read(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], settings: Settings
    ) -> Affine:
        s, scale = scheme, tensors["weight_scale"].read().T
        if "weight" in tensors:
            codes = tensors["weight"].read_codes().view(np.uint8) ^ np.uint8(128)
        else:
            codes = from_words(
                tensors["weight_packed"].read_codes(), s.bits, s.features
            )
        zero = np.full(scale.shape, s.middle, np.uint8)
        if not s.symmetric:
            words = tensors["weight_zero_point"].read_codes()
            zero = from_words(words, s.bits, s.outputs, 0).T
        return Affine(s, codes.T, scale, zero)


def _format(s: Scheme) -> str:
    whole = s.bits == 8 and s.symmetric and s.inputs is not None
    return INTEGERS if whole and s.block is None else PACKED


def _group(s: Scheme) -> dict[str, Any]:
    """One of ``config_groups``, without its targets."""
    blocked = s.block is not None
    weights = dict(
        num_bits=s.bits,
        type="int",
        symmetric=s.symmetric,
        strategy="group" if blocked else "channel",
        group_size=s.block,
        dynamic=False,
    )
    inputs = None
    if s.inputs is not None:
        inputs = dict(num_bits=s.inputs.bits, type="int", symmetric=True)
        inputs |= dict(strategy="token", dynamic=True)
    return dict(weights=weights, input_activations=inputs, format=_format(s))


def _names(target: str, module: str) -> bool:
    """Whether a target (a class, a name, ``re:`` and a pattern) names a module."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _breadth(target: str) -> tuple:
    """Names come before patterns and those before the class, as in the library."""
    return target == "Linear", target.startswith("re:"), target


def _facts(group: Mapping[str, Any]):
    """(bits, symmetric, block, rounding of inputs) of one of ``config_groups``."""
    weights, inputs = setting(group, "weights"), group.get("input_activations")
    check_settings(weights, WEIGHTS)
    check_settings(group, dict(output_activations=(None,)))
    rounding = None
    if inputs is not None:
        check_settings(inputs, INPUTS)
        rounding = ActivationFormat(setting(inputs, "num_bits"))
    blocked = setting(weights, "strategy") == "group"
    block = setting(weights, "group_size") if blocked else None
    return setting(weights, "num_bits"), setting(weights, "symmetric"), block, rounding
