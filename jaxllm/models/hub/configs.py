"""``config.json`` of Hugging Face to a ``Transformer`` and back, through the tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.models.config import Policy
from jaxllm.models.hub.blueprint import Blueprint, describe, difference
from jaxllm.models.hub.families import COMMON_REQUIRES, FAMILIES, IRRELEVANT, Family
from jaxllm.models.hub.rope import read_rope, write_rope
from jaxllm.models.transformer import Transformer

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
LAYER_TYPES = ("full_attention", "sliding_attention")
HEADS_OF = ("ForCausalLM", "LMHeadModel", "Model")
SIZES = frozenset(
    """vocab_size width depth heads kv_heads head_dim hidden max_length top_k experts
    expert_hidden shared_hidden""".split()  # noqa: SIM905
)
FLAGS = frozenset(("tied", "qkv_bias", "out_bias", "mlp_bias", "parallel", "normalize"))


def read_config_data(raw: dict[str, Any], dtype: str = "float32") -> Transformer:
    """The architecture that a ``config.json`` describes.

    Raises:
      ValueError: Unknown ``model_type``, an unknown key, a missing size, or a value
        that is not supported; the message names key and value.
    """
    raw = {k: v for k, v in raw.items() if k not in IRRELEVANT}
    name = raw.pop("model_type", None)
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type {name!r} is not supported; accepted: {known}")
    family = FAMILIES[name]
    _check_architectures(raw.pop("architectures", None), family)
    for other, key in family.alternatives.items():
        if other in raw:
            raw.setdefault(key, raw[other])
            del raw[other]
    _check_required(raw, family)
    facts = dict(family.facts) | _read_keys(raw, family)
    depth = facts["depth"]
    if family.rope is not None:
        found = read_rope(raw, family.rope, facts["max_length"])
        facts |= dict(zip(("rope", "local_rope"), found, strict=True))
    facts |= _read_windows(raw, family, depth)
    facts["sparse"] = _read_sparse(raw, family, depth)
    for key, value in raw.items():
        if value is not None:
            raise ValueError(f"{name}: config key {key!r} = {value!r} is not supported")
    return Blueprint(**facts).build(name, Policy(dtype, dtype))


def write_config_data(config: Transformer) -> dict[str, Any]:
    """The ``config.json`` of a model, such that reading it gives ``config`` back.

    Raises:
      ValueError: The family cannot express the architecture; names where.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"family {config.family!r}; accepted at export: {known}")
    facts = describe(config)
    out: dict[str, Any] = {"architectures": [family.architecture]}
    out |= {"model_type": config.family, "torch_dtype": config.policy.param}
    for key, fields in family.keys.items():
        out[key] = _encode(fields.split()[0], getattr(facts, fields.split()[0]))
    out |= {key: accepted[0] for key, accepted in family.requires.items()}
    if family.rope is not None and facts.rope is not None:
        ropes = facts.rope, facts.local_rope
        out |= write_rope(*ropes, family.rope, facts.max_length)
    out |= _write_windows(facts, family)
    if family.sparse_keys:
        dense = [i for i, sparse in enumerate(facts.sparse) if not sparse]
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    again = read_config_data(out, config.policy.param)
    again = dataclasses.replace(again, policy=config.policy)
    if where := difference(config, again):
        raise ValueError(
            f"a {config.family} config cannot express this model ({where}); "
            "save it as a checkpoint instead"
        )
    return out


def _check_architectures(names, family: Family) -> None:
    for name in names or ():
        if not name.endswith(HEADS_OF):
            raise ValueError(
                f"architecture {name!r} is not supported; accepted: a language model "
                f"such as {family.architecture!r}"
            )


def _check_required(raw: dict, family: Family) -> None:
    """Refuse values that change the function; drop the keys that passed."""
    rules = COMMON_REQUIRES | dict(family.requires) | dict(family.neutral)
    for key, accepted in rules.items():
        if key in raw and (value := raw.pop(key)) not in accepted and value is not None:
            some = " or ".join(map(repr, accepted))
            raise ValueError(f"config key {key!r} = {value!r}; accepted: {some}")


def _read_keys(raw: dict, family: Family) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, fields in family.keys.items():
        if key not in raw and key not in family.defaults:
            raise ValueError(f"config key {key!r} is missing")
        value = raw.pop(key, family.defaults.get(key))
        if value is None and fields in ("activation", "init_std"):
            value = family.defaults[key]
        for field in fields.split():
            found = _decode(field, key, value)
            if found is None and field in facts:
                continue
            if facts.get(field, found) != found:
                message = f"config key {key!r} = {value!r}; accepted: {facts[field]!r}"
                raise ValueError(message)
            facts[field] = found
    return facts


def _decode(field: str, key: str, value):
    """A key's value as a field of the blueprint."""
    if field == "activation":
        if value not in ACTIVATIONS:
            some = ", ".join(ACTIVATIONS)
            raise ValueError(f"config key {key!r} = {value!r}; accepted: {some}")
        return ACTIVATIONS[value]
    if field in FLAGS and not isinstance(value, bool):
        raise ValueError(f"config key {key!r} = {value!r}; accepted: true, false")
    if value is None:
        return None
    if field in SIZES and (type(value) is not int or value < 1):
        raise ValueError(f"config key {key!r} = {value!r}; accepted: an integer >= 1")
    return value**-0.5 if field == "scale" else value


def _encode(field: str, value):
    if field == "activation":
        return next(k for k, v in ACTIVATIONS.items() if v == value)
    if field == "scale" and value is not None:
        return round(value**-2)
    return value


def _read_windows(raw: dict, family: Family, depth: int) -> dict[str, Any]:
    """The fields ``window`` and ``windowed``."""
    keys = {k: raw.pop(k, v) for k, v in family.window_keys.items()}
    types = raw.pop("layer_types", None) if family.layer_types else None
    window = keys.get("sliding_window")
    if not keys.get("use_sliding_window", True):
        window = None
    if types is None:
        rule = family.windows or (lambda keys, i: False)
        windowed = tuple(bool(window and rule(keys, i)) for i in range(depth))
        return dict(window=window, windowed=windowed)
    for kind in types:
        if kind not in LAYER_TYPES:
            some = " or ".join(map(repr, LAYER_TYPES))
            raise ValueError(f"layer_types has {kind!r}; accepted: {some}")
    windowed = tuple(kind == LAYER_TYPES[1] for kind in types)
    if len(windowed) != depth or (any(windowed) and not window):
        raise ValueError(
            f"layer_types = {types!r} with {depth} layers and sliding_window {window!r}"
        )
    return dict(window=window, windowed=windowed)


def _write_windows(facts: Blueprint, family: Family) -> dict[str, Any]:
    keys, some = family.window_keys, any(facts.windowed)
    if not keys:
        return {}
    out: dict[str, Any] = {"sliding_window": facts.window if some else None}
    if "use_sliding_window" in keys:
        out["use_sliding_window"] = some
    if "max_window_layers" in keys:
        out["max_window_layers"] = facts.depth - sum(facts.windowed)
    if family.layer_types:
        out["layer_types"] = [LAYER_TYPES[w] for w in facts.windowed]
        out["sliding_window"] = facts.window or keys["sliding_window"]
    return out


def _read_sparse(raw: dict, family: Family, depth: int) -> tuple[bool, ...]:
    """Which layers are mixtures of experts."""
    if not family.sparse_keys:
        return ("experts" in set(family.keys.values()),) * depth
    step = raw.pop("decoder_sparse_step", 1)
    dense = raw.pop("mlp_only_layers", None) or []
    if type(step) is not int or step < 1:
        raise ValueError(f"decoder_sparse_step = {step!r}; accepted: an integer >= 1")
    if bad := [i for i in dense if i not in range(depth)]:
        raise ValueError(f"mlp_only_layers has {bad[0]!r}; there are {depth} layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(depth))
