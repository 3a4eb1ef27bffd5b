"""The names of the families' tensors, as data: theirs, ours, and the layout.

``{i}`` is a layer, ``{e}`` an expert. A module covers its weight and its bias; several
names of ours are parts of one fused tensor.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of theirs and the parts of ours that it holds.

    ``layout``: ``linear`` stores [out, in], ``conv`` [in, out]; parts follow each
    other along out. ``heads`` is linear with the parts interleaved head by head.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "linear"


def _modules(
    theirs: str, ours: str, names: dict[str, str], layout: str = "linear"
) -> tuple[Module, ...]:
    """``names`` under two prefixes; parts of a fused tensor are separated by spaces."""
    return tuple(
        Module(theirs + a, tuple(ours + part for part in b.split()), layout)
        for a, b in names.items()
    )


def _layer(names: dict[str, str], layout: str = "linear", base="model.layers.{i}."):
    return _modules(base, "layers.{i}.", names, layout)


ENDS = _modules(
    "",
    "",
    {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"},
)
ATTENTION = _layer(
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.o_proj": "attn.o",
        "self_attn.q_norm": "attn.q_norm",
        "self_attn.k_norm": "attn.k_norm",
    }
)
MLP_NORM = _layer({"post_attention_layernorm": "mlp_norm"})
MLP = _layer(
    {
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
)
SANDWICH = _layer(
    {
        "post_attention_layernorm": "attn_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    }
)
QWEN_EXPERTS = _layer(
    {
        "mlp.gate": "moe.router",
        "mlp.experts.{e}.gate_proj": "moe.experts.gate",
        "mlp.experts.{e}.up_proj": "moe.experts.up",
        "mlp.experts.{e}.down_proj": "moe.experts.down",
        "mlp.shared_expert.gate_proj": "moe.shared.gate",
        "mlp.shared_expert.up_proj": "moe.shared.up",
        "mlp.shared_expert.down_proj": "moe.shared.down",
        "mlp.shared_expert_gate": "moe.shared_gate",
    }
)
MIXTRAL_EXPERTS = _layer(
    {
        "block_sparse_moe.gate": "moe.router",
        "block_sparse_moe.experts.{e}.w1": "moe.experts.gate",
        "block_sparse_moe.experts.{e}.w3": "moe.experts.up",
        "block_sparse_moe.experts.{e}.w2": "moe.experts.down",
    }
)
LLAMA = ENDS + ATTENTION + MLP_NORM + MLP
GEMMA2 = ENDS + ATTENTION + SANDWICH + MLP
MIXTRAL = ENDS + ATTENTION + MLP_NORM + MIXTRAL_EXPERTS
QWEN_MOE = LLAMA + QWEN_EXPERTS
PHI3 = (
    ENDS
    + MLP_NORM
    + _layer(
        {
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn.q attn.k attn.v",
            "self_attn.o_proj": "attn.o",
            "mlp.gate_up_proj": "mlp.gate mlp.up",
            "mlp.down_proj": "mlp.down",
        }
    )
)
OPT = _modules(
    "",
    "",
    {
        "model.decoder.embed_tokens": "embed",
        "model.decoder.embed_positions": "positions",
        "model.decoder.final_layer_norm": "norm",
        "lm_head": "head",
    },
) + _layer(
    {
        "self_attn_layer_norm": "attn_norm",
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.out_proj": "attn.o",
        "final_layer_norm": "mlp_norm",
        "fc1": "mlp.up",
        "fc2": "mlp.down",
    },
    base="model.decoder.layers.{i}.",
)
GPT2 = _modules(
    "",
    "",
    {
        "transformer.wte": "embed",
        "transformer.wpe": "positions",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    },
) + _layer(
    {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn.q attn.k attn.v",
        "attn.c_proj": "attn.o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
    layout="conv",
    base="transformer.h.{i}.",
)
_NEOX = "gpt_neox.layers.{i}."
GPT_NEOX = (
    _modules(
        "",
        "",
        {
            "gpt_neox.embed_in": "embed",
            "gpt_neox.final_layer_norm": "norm",
            "embed_out": "head",
        },
    )
    + _layer({"attention.query_key_value": "attn.q attn.k attn.v"}, "heads", base=_NEOX)
    + _layer(
        {
            "input_layernorm": "attn_norm",
            "attention.dense": "attn.o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        },
        base=_NEOX,
    )
)

# Prefixes that a checkpoint of the bare model leaves out.
PREFIXES = ("model.", "model.decoder.", "transformer.", "gpt_neox.")

# Buffers that older checkpoints carry: masks and frequencies, recomputed here.
BUFFERS = (
    "*.rotary_emb.inv_freq",
    "*.attention.bias",
    "*.attention.masked_bias",
    "*h.*.attn.bias",
    "*h.*.attn.masked_bias",
)
