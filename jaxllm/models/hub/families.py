"""One table per family: how a Hugging Face ``config.json`` says what a layer is.

``keys`` maps a key to a field of ``Blueprint``; ``defaults`` is what an absent key
means; ``facts`` are the fields that the family fixes; ``requires`` lists keys with the
only values that are supported (the first is written at export), ``neutral`` those that
export leaves out; ``alternatives`` are other spellings of a key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.models.hub import names


@dataclasses.dataclass(frozen=True)
class RopeKeys:
    """Names and defaults of the rotary embedding's keys outside ``rope_scaling``.

    ``partial``: the family can turn a fraction of each head; others ignore the key.
    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    fraction: str = "partial_rotary_factor"
    default_fraction: float = 1.0
    partial: bool = False
    local_theta: str | None = None
    default_local_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class Family:
    """What import and export know about a ``model_type``; see the module."""

    architecture: str
    modules: tuple[names.Module, ...]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    requires: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    alternatives: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rope: RopeKeys | None = RopeKeys()
    windows: Callable[[dict, int], bool] | None = None
    window_keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_types: bool = False
    sparse_keys: bool = False


# Keys that do not change the function: bookkeeping, training, generation, hardware.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    _name_or_path _commit_hash activation_dropout attention_dropout attn_pdrop
    auto_map bad_words_ids begin_suppress_tokens bos_token_id boi_token_index
    cache_implementation chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dropout dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    eoi_token_index exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label
    image_token_index is_decoder is_llama_config label2id layerdrop
    length_penalty max_length max_sequence_length min_length n_ctx no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values
    reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict
    return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id
    suppress_tokens summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)

# Keys of every family with the only values that leave the function as we compute it.
COMMON_REQUIRES = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tied",
    "initializer_range": "init_std",
}
COMMON = SIZES | {
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "hidden_act": "activation",
    "rms_norm_eps": "eps",
}
DEFAULTS = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096}
GEMMA_KEYS = {k: v for k, v in COMMON.items() if k != "hidden_act"}
GEMMA_DEFAULTS = DEFAULTS | {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "head_dim": 256,
}
GEMMA_FACTS = dict(plus_one=True, embed_scale=True)
SOFTCAPS = {
    "query_pre_attn_scalar": "scale",
    "attn_logit_softcapping": "softcap",
    "final_logit_softcapping": "logit_softcap",
}
ROUTING = {
    "num_experts_per_tok": "top_k",
    "num_experts": "experts",
    "moe_intermediate_size": "expert_hidden",
    "norm_topk_prob": "normalize",
}
LAYER_NORM = dict(norm="layer", gated=False, mlp_bias=True)


def everywhere(raw: dict, layer: int) -> bool:
    """Every layer; readers disagree about a count of layers before the window."""
    if raw.get("max_window_layers"):
        raise ValueError(
            f"config key 'max_window_layers' = {raw['max_window_layers']!r} with a "
            "sliding window; accepted: 0"
        )
    return True


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        names.LLAMA,
        COMMON | {"attention_bias": "qkv_bias out_bias", "mlp_bias": "mlp_bias"},
        DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        names.LLAMA,
        COMMON,
        DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
        windows=everywhere,
        window_keys={"sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        names.LLAMA,
        COMMON,
        DEFAULTS | {"max_position_embeddings": 32768},
        facts=dict(qkv_bias=True),
        windows=lambda raw, i: i >= raw["max_window_layers"],
        window_keys=QWEN_WINDOWS | {"max_window_layers": 28},
        layer_types=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        names.LLAMA,
        COMMON | {"attention_bias": "qkv_bias out_bias"},
        DEFAULTS
        | {"max_position_embeddings": 32768, "head_dim": 128, "attention_bias": False},
        facts=dict(qk_norm=True),
        windows=lambda raw, i: i >= raw["max_window_layers"],
        window_keys=QWEN_WINDOWS | {"max_window_layers": 28},
        layer_types=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        names.LLAMA,
        GEMMA_KEYS
        | {"hidden_activation": "activation", "attention_bias": "qkv_bias out_bias"},
        GEMMA_DEFAULTS | {"max_position_embeddings": 8192},
        facts=GEMMA_FACTS,
        # The released files say "gelu" here, and mean the tanh form.
        requires={
            "hidden_act": ("gelu_pytorch_tanh", "gelu", "gelu_new"),
            "use_bidirectional_attention": (None, False),
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        names.GEMMA2,
        GEMMA_KEYS
        | SOFTCAPS
        | {"hidden_activation": "activation", "attention_bias": "qkv_bias out_bias"},
        GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        facts=GEMMA_FACTS | dict(post_norm=True),
        requires={
            "hidden_act": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (None, False),
        },
        windows=lambda raw, i: i % 2 == 0,
        window_keys={"sliding_window": 4096},
        layer_types=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        names.GEMMA2,
        GEMMA_KEYS
        | {"hidden_activation": "activation", "attention_bias": "qkv_bias out_bias"}
        | {k: v for k, v in SOFTCAPS.items() if k != "attn_logit_softcapping"},
        GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": None,
        },
        facts=GEMMA_FACTS | dict(post_norm=True, qk_norm=True),
        # transformers reads the attention softcap of Gemma 3 and does not apply it.
        requires={
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        alternatives={"_sliding_window_pattern": "sliding_window_pattern"},
        rope=RopeKeys(default_theta=1e6, local_theta="rope_local_base_freq"),
        windows=lambda raw, i: (i + 1) % raw["sliding_window_pattern"] != 0,
        window_keys={"sliding_window": 4096, "sliding_window_pattern": 6},
        layer_types=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        names.PHI3,
        {k: v for k, v in COMMON.items() if k != "head_dim"},
        DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        neutral=dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,))
        | dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
        rope=RopeKeys(partial=True),
        windows=everywhere,
        window_keys={"sliding_window": None},
    ),
    "opt": Family(
        "OPTForCausalLM",
        names.OPT,
        {k: v for k, v in SIZES.items() if k[:5] not in ("inter", "initi")}
        | {
            "word_embed_proj_dim": "width",
            "ffn_dim": "hidden",
            "init_std": "init_std",
            "activation_function": "activation",
            "enable_bias": "qkv_bias out_bias mlp_bias",
        },
        {
            "tie_word_embeddings": True,
            "init_std": 0.02,
            "word_embed_proj_dim": None,
            "activation_function": "relu",
            "enable_bias": True,
            "max_position_embeddings": 2048,
        },
        facts=LAYER_NORM | dict(learned_positions=True, position_offset=2, eps=1e-5),
        # opt-350m has its norms after the sums and a narrower embedding.
        requires={
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
        alternatives={"initializer_range": "init_std"},
        rope=None,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        names.GPT2,
        {
            "vocab_size": "vocab_size",
            "n_embd": "width",
            "n_layer": "depth",
            "n_head": "heads",
            "n_inner": "hidden",
            "n_positions": "max_length",
            "tie_word_embeddings": "tied",
            "initializer_range": "init_std",
            "activation_function": "activation",
            "layer_norm_epsilon": "eps",
        },
        {
            "n_inner": None,
            "n_positions": 1024,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        },
        facts=LAYER_NORM | dict(learned_positions=True, qkv_bias=True, out_bias=True),
        requires={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        rope=None,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        names.GPT_NEOX,
        SIZES
        | {
            "hidden_act": "activation",
            "layer_norm_eps": "eps",
            "use_parallel_residual": "parallel",
            "attention_bias": "qkv_bias out_bias",
        },
        {
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "attention_bias": True,
            "max_position_embeddings": 2048,
        },
        facts=LAYER_NORM,
        rope=RopeKeys("rotary_emb_base", 10000.0, "rotary_pct", 0.25, partial=True),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        names.MIXTRAL,
        {k: v for k, v in COMMON.items() if k != "intermediate_size"}
        | {
            "intermediate_size": "expert_hidden",
            "num_local_experts": "experts",
            "num_experts_per_tok": "top_k",
        },
        DEFAULTS
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 4096 * 32,
        },
        alternatives={"num_experts": "num_local_experts"},
        rope=RopeKeys(default_theta=1e6),
        windows=everywhere,
        window_keys={"sliding_window": None},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        names.QWEN_MOE,
        {k: v for k, v in COMMON.items() if k != "head_dim"}
        | ROUTING
        | {"shared_expert_intermediate_size": "shared_hidden", "qkv_bias": "qkv_bias"},
        DEFAULTS
        | {
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
            "max_position_embeddings": 32768,
        },
        facts=dict(shared_gate=True),
        alternatives={"num_local_experts": "num_experts"},
        windows=lambda raw, i: i % 2 == 0 and i < raw["max_window_layers"],
        window_keys=QWEN_WINDOWS | {"max_window_layers": 28},
        layer_types=True,
        sparse_keys=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        names.QWEN_MOE,
        COMMON | ROUTING | {"attention_bias": "qkv_bias out_bias"},
        DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "attention_bias": False,
            "max_position_embeddings": 32768,
        },
        facts=dict(qk_norm=True),
        alternatives={"num_local_experts": "num_experts"},
        windows=everywhere,
        window_keys=QWEN_WINDOWS | {"max_window_layers": 0},
        sparse_keys=True,
    ),
}
