"""What GGUF calls the families it has in common with us: metadata keys and tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.models.hub.blueprint import difference
from jaxllm.models.hub.configs import read_config_data, write_config_data
from jaxllm.models.hub.names import Module
from jaxllm.models.transformer import Transformer

MODULES = tuple(
    Module(theirs, (ours,))
    for theirs, ours in {
        "token_embd": "embed",
        "output_norm": "norm",
        "output": "head",
        "blk.{i}.attn_norm": "layers.{i}.attn_norm",
        "blk.{i}.attn_q": "layers.{i}.attn.q",
        "blk.{i}.attn_k": "layers.{i}.attn.k",
        "blk.{i}.attn_v": "layers.{i}.attn.v",
        "blk.{i}.attn_output": "layers.{i}.attn.o",
        "blk.{i}.attn_q_norm": "layers.{i}.attn.q_norm",
        "blk.{i}.attn_k_norm": "layers.{i}.attn.k_norm",
        "blk.{i}.ffn_norm": "layers.{i}.mlp_norm",
        "blk.{i}.ffn_gate": "layers.{i}.mlp.gate",
        "blk.{i}.ffn_up": "layers.{i}.mlp.up",
        "blk.{i}.ffn_down": "layers.{i}.mlp.down",
    }.items()
)
# Behind the architecture's name: the key of config.json.
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
SCALING, FACTOR = "rope.scaling.type", "rope.scaling.factor"
OLD_FACTOR = "rope.scale_linear"
# What else is the size of a head; of values, and how many channels are turned.
HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "rope.freq_base",
    "vocab_size",
)
# Read here, or not used by llama.cpp with what is accepted here.
READ = {*KEYS, *HEAD_SIZES, SCALING, FACTOR, OLD_FACTOR} | {
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
# Other keys of these names could change the function, but not where they are 0 (some
# scales: 1), or these values.
TELLING = re.compile(r"(attention|rope)\..*|expert_.*|.*_scale")
NEUTRAL = {"attention.causal": (True,), "rope.scaling.attn_factor": (1.0,)}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A GGUF architecture; ``paired``: rows of q and k are in rotary pairs."""

    name: str
    family: str
    paired: bool


# A Mistral without a window is a Llama.
ARCHITECTURES = {
    "llama": Architecture("llama", "llama", True),
    "mistral": Architecture("llama", "llama", True),
    "qwen2": Architecture("qwen2", "qwen2", False),
    "qwen3": Architecture("qwen3", "qwen3", False),
}


def write_metadata(config: Transformer) -> dict[str, Any]:
    """The keys of an architecture, such that reading them gives ``config`` back.

    Raises ``ValueError`` for a family or a configuration that GGUF (as written here)
    cannot express; says where.
    """
    if config.family not in ARCHITECTURES:
        some = ", ".join(ARCHITECTURES)
        raise ValueError(f"gguf: family {config.family!r}; accepted: {some}")
    name = ARCHITECTURES[config.family].name
    raw = write_config_data(config)
    if raw.get("head_dim") is None:
        raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    out: dict[str, Any] = {"general.architecture": name}
    for key, theirs in KEYS.items():
        value = raw[theirs]
        if key in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
            value = float(value)
        out[f"{name}.{key}"] = value
    out |= {f"{name}.{key}": raw["head_dim"] for key in HEAD_SIZES}
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        out[f"{name}.{SCALING}"] = "linear"
        out[f"{name}.{FACTOR}"] = float(scaling["factor"])
    _check_same(config, read_metadata(out, _features(config), config.policy.param))
    return out


def read_metadata(
    metadata: Mapping[str, Any], tensors: frozenset[str], dtype: str
) -> Transformer:
    """The architecture of a file; what its tensors are says the rest (ties, biases).

    As in llama.cpp a head has width / heads channels where no key says how many.

    Raises ``ValueError`` for an architecture, a rotary embedding or a key that is not
    supported, and for a missing key.
    """
    name = metadata.get("general.architecture")
    found = next((a for a in ARCHITECTURES.values() if a.name == name), None)
    if found is None:
        some = ", ".join(sorted({a.name for a in ARCHITECTURES.values()}))
        raise ValueError(f"gguf architecture {name!r}; accepted: {some}")
    own = {
        key.removeprefix(f"{name}."): _shortest(v) if isinstance(v, float) else v
        for key, v in metadata.items()
        if key.startswith(f"{name}.")
    }
    _check_keys(own, name)
    raw: dict[str, Any] = {"model_type": found.family, "head_dim": None}
    raw |= {theirs: own[key] for key, theirs in KEYS.items() if key in own}
    if "vocab_size" not in raw:
        raw["vocab_size"] = len(metadata.get("tokenizer.ggml.tokens", ()))
    raw["rope_scaling"] = _read_scaling(own, tensors)
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    if found.family in ("llama", "qwen3"):
        raw["attention_bias"] = "blk.0.attn_output.bias" in tensors
    if found.family == "llama":
        raw["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    config = read_config_data(raw, dtype)
    _check_head(own, name, config.layers[0].attention.head_dim)
    return config


def _check_keys(own: Mapping[str, Any], name: str) -> None:
    """Refuse a file that lacks a key, or has one that could change the function."""
    for key in KEYS:
        if key not in own and key not in OPTIONAL:
            full = f"{name}.{key}"
            raise ValueError(f"gguf metadata lacks {full!r}")
    for key in sorted(own.keys() - READ):
        neutral = NEUTRAL.get(key, (0, 1) if key.endswith("_scale") else (0,))
        if TELLING.fullmatch(key) and own[key] not in neutral:
            full, some = f"{name}.{key}", " or ".join(map(repr, neutral))
            raise ValueError(f"gguf key {full!r} = {own[key]!r}; accepted: {some}")


def _read_scaling(own: Mapping[str, Any], tensors: frozenset[str]) -> dict | None:
    """``rope_scaling`` of a file's keys; without a type a factor is linear."""
    kind, factor = own.get(SCALING, "linear"), own.get(FACTOR, own.get(OLD_FACTOR))
    if kind not in ("none", "linear") or "rope_freqs.weight" in tensors:
        what = "rope_freqs" if kind in ("none", "linear") else kind
        raise ValueError(f"gguf rope scaling {what!r}; accepted: 'none', 'linear'")
    linear = kind == "linear" and factor
    return {"rope_type": "linear", "factor": factor} if linear else None


def _check_head(own: Mapping[str, Any], name: str, dim: int) -> None:
    """Refuse values of another size than keys, and a head that is turned in part."""
    for key in HEAD_SIZES:
        if own.get(key, dim) != dim:
            full = f"{name}.{key}"
            raise ValueError(f"gguf key {full!r} = {own[key]}; accepted: {dim}")


def _features(config: Transformer) -> frozenset[str]:
    """The tensors by which ``read_metadata`` tells configurations apart."""
    layer = config.layers[0]
    present = {
        "output.weight": not config.tied,
        "blk.0.attn_output.bias": layer.attention.out_bias,
        "blk.0.ffn_up.bias": getattr(layer.ffn, "bias", False),
    }
    return frozenset(name for name, there in present.items() if there)


def _check_same(config: Transformer, again: Transformer) -> None:
    """GGUF has no initialiser and no dtype policy, and calls a Mistral a Llama."""
    again = dataclasses.replace(
        again, policy=config.policy, init_std=config.init_std, family=config.family
    )
    if where := difference(config, again):
        raise ValueError(f"gguf cannot express this model ({where})")


def _shortest(value: float) -> float:
    """The decimal number that a float32 was made of: 1e-05, not 9.9999997e-06."""
    return float(str(np.float32(value)))
