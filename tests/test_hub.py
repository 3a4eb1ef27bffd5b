"""Every family computes what ``transformers`` computes, and exports what it loads.

Tiny random checkpoints in float32 with eager attention; norms and biases are random
too, windows are shorter than the sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxllm.generation import generate
from jaxllm.models import Rope
from jaxllm.models.hub import load_model, save_pretrained
from jaxllm.models.hub.configs import read_config_data, write_config_data
from jaxllm.models.hub.families import FAMILIES

VOCABULARY, LENGTH = 96, 24
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH))
IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
ENDS = dict(vocab_size=VOCABULARY, **IDS)
BASE = ENDS | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
WIDE = BASE | dict(head_dim=16)
NEOX = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(**fields) -> dict:
    return dict(rope_parameters=dict(rope_theta=10000.0, **fields))


LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0)
FACTORS = dict(short_factor=[1.0, 1.05, 1.1, 1.2], long_factor=[1.1, 1.5, 2.0, 3.0])
LINEAR = dict(rope_type="linear", factor=8.0, rope_theta=1e6)
# name: (model_type, arguments of its configuration in transformers)
CASES = {
    "llama": ("llama", BASE),
    "llama_biased_tied": (
        "llama",
        WIDE | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama_linear": ("llama", BASE | rope(rope_type="linear", factor=4.0)),
    "llama_3": (
        "llama",
        BASE
        | rope(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=16,
            **LLAMA3,
        ),
    ),
    "llama_yarn": (
        "llama",
        BASE | rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "mistral": ("mistral", BASE | dict(sliding_window=5)),
    "qwen2": (
        "qwen2",
        BASE | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE | dict(sliding_window=5, query_pre_attn_scalar=24)),
    "gemma3": (
        "gemma3_text",
        WIDE
        | dict(
            num_hidden_layers=3,
            sliding_window=5,
            query_pre_attn_scalar=24,
            final_logit_softcapping=20.0,
            layer_types=TYPES,
            rope_parameters={
                "full_attention": LINEAR,
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "phi3": ("phi3", BASE | dict(sliding_window=6)),
    "phi3_longrope": (
        "phi3",
        BASE
        | dict(original_max_position_embeddings=16)
        | rope(rope_type="longrope", **FACTORS),
    ),
    "opt": (
        "opt",
        ENDS
        | dict(hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2)
        | dict(ffn_dim=48, num_attention_heads=4, max_position_embeddings=64),
    ),
    "gpt2": ("gpt2", ENDS | dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "pythia": (
        "gpt_neox",
        NEOX | rope(rope_type="default", partial_rotary_factor=0.5),
    ),
    "neox_sequential": ("gpt_neox", NEOX | dict(use_parallel_residual=False)),
    "mixtral": ("mixtral", BASE | dict(num_local_experts=4, sliding_window=5)),
    "qwen2_moe": (
        "qwen2_moe",
        BASE
        | EXPERTS
        | dict(shared_expert_intermediate_size=40, num_hidden_layers=3)
        | dict(mlp_only_layers=[0], decoder_sparse_step=1),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        WIDE | EXPERTS | dict(norm_topk_prob=True, decoder_sparse_step=2),
    ),
}
assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


@pytest.fixture(scope="module")
def hf():
    """The optional other half: pip install 'jaxllm[hf]'."""
    pytest.importorskip("torch", reason="needs the extra 'hf'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@dataclasses.dataclass
class Case:
    """A checkpoint of transformers on disk, and both models of it."""

    theirs: object
    ours: object
    folder: object

    def logits(self, mask=None, positions=None, theirs=None) -> np.ndarray:
        """What transformers computes."""
        import torch

        more = dict(attention_mask=mask, position_ids=positions)
        more = {k: torch.tensor(v) for k, v in more.items() if v is not None}
        with torch.no_grad():
            run = theirs or self.theirs
            return run(torch.tensor(TOKENS), **more).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request, hf, tmp_path_factory):
    import torch

    kind, fields = CASES[request.param]
    config = hf.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    theirs = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            is_scale = p.ndim == 1 and name.endswith("weight") and "gemma" not in kind
            p.normal_(float(is_scale), 0.25)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.eval().save_pretrained(folder)
    return Case(theirs, load_model(folder), folder)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def forward(model, tokens, positions, segments, cache=None):
    return model(tokens, positions=positions, segments=segments, cache=cache)


ROW = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)


def close(ours, theirs, where=slice(None)) -> None:
    np.testing.assert_allclose(np.asarray(ours)[where], theirs[where], 0, 1e-4)


def test_same_logits(case):
    expected = case.logits()
    assert np.abs(expected).max() > 1
    close(forward(case.ours, TOKENS, ROW, np.ones_like(ROW)), expected)


def test_same_logits_with_padding(case):
    """A full row, one padded by 5 on the left, one by 7 on the right."""
    mask = np.ones_like(TOKENS)
    mask[1, :5], mask[2, -7:] = 0, 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    ours = forward(case.ours, TOKENS, positions, mask)
    close(ours, case.logits(mask, positions), mask > 0)


def test_same_logits_through_the_cache(case):
    """Eighteen tokens at once, then one by one."""
    expected = case.logits()
    cache = case.ours.config.empty_cache(len(TOKENS), LENGTH)
    for start, stop in ((0, 18), *((i, i + 1) for i in range(18, LENGTH))):
        now = (x[:, start:stop] for x in (TOKENS, ROW, np.ones_like(ROW)))
        logits, cache = forward(case.ours, *now, cache)
        close(logits, expected[:, start:stop])


@pytest.mark.parametrize("case", ["phi3_longrope"], indirect=True)
def test_longrope_generates_as_transformers(case):
    """From 12 tokens over the 16 at which both read the text again, rows together."""
    import torch

    prompts = TOKENS[:, :12].tolist()
    found = generate(case.ours, None, [*prompts, TOKENS[0].tolist()], 8)
    for prompt, one in zip(prompts, found[:3], strict=True):
        theirs = case.theirs.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False
        )
        assert one.tokens == tuple(theirs[0, 12:].tolist())


def test_export_loads_in_transformers(case, hf, tmp_path):
    """Equal logits, equal tensors, equal configuration; in several shards."""
    out = save_pretrained(case.ours, tmp_path / "out", shard_bytes=20e3)
    assert len(list(out.glob("*.safetensors"))) > 1
    kinds = dict(attn_implementation="eager", dtype="float32")
    again = hf.AutoModelForCausalLM.from_pretrained(out, **kinds).eval()
    np.testing.assert_allclose(
        case.logits(theirs=again), case.logits(), rtol=0, atol=1e-5
    )
    before, after = case.theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(bool((before[k] == after[k]).all()) for k in before)
    mine = load_model(out)
    assert mine.config == case.ours.config
    jax.tree.map(np.testing.assert_array_equal, mine.params, case.ours.params)


# Released configurations, as their old files spell them.
LLAMA_31 = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=14336,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_scaling=dict(
        factor=8.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
        **LLAMA3,
    ),
    rope_theta=500000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.42.3",
    use_cache=True,
    vocab_size=128256,
)
GEMMA_3 = dict(
    model_type="gemma3_text",
    attn_logit_softcapping=None,
    cache_implementation="hybrid",
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_local_base_freq=10000,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)
PYTHIA = dict(
    model_type="gpt_neox",
    hidden_act="gelu",
    hidden_size=512,
    intermediate_size=2048,
    layer_norm_eps=1e-5,
    max_position_embeddings=2048,
    num_attention_heads=8,
    num_hidden_layers=6,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    tie_word_embeddings=False,
    use_parallel_residual=True,
    vocab_size=50304,
)
PHI_35 = dict(
    model_type="phi3",
    attention_bias=False,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=4,
    num_key_value_heads=32,
    original_max_position_embeddings=4096,
    resid_pdrop=0.0,
    rms_norm_eps=1e-5,
    rope_scaling=dict(type="longrope", long_factor=[1.5] * 48, short_factor=[1.1] * 48),
    rope_theta=10000.0,
    sliding_window=262144,
    vocab_size=32064,
)
QWEN_25 = dict(
    model_type="qwen2",
    hidden_size=896,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=21,
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_mrope=False,
    use_sliding_window=False,
    vocab_size=151936,
)
PHI_4 = PHI_35 | dict(
    full_attn_mod=1,
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
    num_key_value_heads=8,
    num_attention_heads=24,
    partial_rotary_factor=0.75,
    tie_word_embeddings=True,
    vocab_size=200064,
)
QWEN_3_MOE = dict(
    model_type="qwen3_moe",
    decoder_sparse_step=1,
    head_dim=128,
    hidden_size=2048,
    initializer_range=0.01,
    intermediate_size=6144,
    max_position_embeddings=40960,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=None,
    use_sliding_window=False,
    vocab_size=151936,
)
OLD = dict(llama=LLAMA_31, gemma=GEMMA_3, pythia=PYTHIA, phi=PHI_35, qwen=QWEN_25)
OLD |= dict(phi_4=PHI_4, qwen_3_moe=QWEN_3_MOE)


@pytest.mark.parametrize("name", OLD)
def test_old_spelling_means_what_transformers_makes_of_it(name, hf):
    fields = {k: v for k, v in OLD[name].items() if k != "model_type"}
    fields = copy.deepcopy(fields)  # for_model writes into it
    new = hf.AutoConfig.for_model(OLD[name]["model_type"], **fields).to_dict()
    assert "rope_parameters" in new
    assert read_config_data(new) == read_config_data(OLD[name])


@pytest.mark.parametrize("name", OLD)
def test_config_round_trip(name):
    config = read_config_data(OLD[name])
    assert read_config_data(write_config_data(config)) == config


def test_released_facts():
    llama = read_config_data(LLAMA_31)
    attention = llama.layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (32, 8, 128)
    assert attention.rope.scaling.factor == 8.0 and attention.rope.theta == 5e5
    gemma = read_config_data(GEMMA_3)
    windows = [layer.attention.window for layer in gemma.layers]
    assert windows[:6] == [512] * 5 + [None] and gemma.tied
    assert gemma.layers[0].attention.rope == Rope()
    assert gemma.layers[5].attention.rope.scaling.factor == 8.0
    phi = read_config_data(PHI_35).layers[0].attention.rope.scaling
    assert phi.attention_factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert read_config_data(QWEN_25).layers[-1].attention.window is None
    assert read_config_data(PHI_4).layers[0].attention.rope.fraction == 0.75
    moe = read_config_data(QWEN_3_MOE)
    assert moe.layers[0].attention.window is None and moe.init_std == 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mamba"), r"'mamba'.*gpt2.*llama"),
        (dict(model_type=None), r"None.*accepted"),
        (dict(clip_qkv=8.0), r"'clip_qkv' = 8.0"),
        (dict(quantization_config={"bits": 4}), r"'quantization_config' = "),
        (dict(hidden_act="mish"), r"'hidden_act' = 'mish'.*silu"),
        (dict(hidden_size="4096"), r"'hidden_size' = '4096'.*integer"),
        (dict(num_hidden_layers=0), r"'num_hidden_layers' = 0"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), r"'dynamic'.*llama3"),
        (dict(rope_scaling=dict(type="linear")), r"lacks 'factor'"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, a=1)), r"'a' = 1"),
        (dict(rope_interleaved=True), r"'rope_interleaved' = True"),
        (dict(architectures=["LlamaForSequenceClassification"]), r"SequenceClass"),
        (dict(tie_word_embeddings="no"), r"'tie_word_embeddings' = 'no'"),
        (dict(num_key_value_heads=5), r"32 query heads .* 5 KV heads"),
        (dict(partial_rotary_factor=0.5), r"'partial_rotary_factor' = 0.5.* 1.0"),
        (rope(partial_rotary_factor=0.25), r"'partial_rotary_factor' = 0.25"),
        (PHI_35 | dict(attention_bias=True), r"'attention_bias' = True.*False"),
        (QWEN_25 | dict(use_mrope=True), r"'use_mrope' = True"),
        (
            QWEN_3_MOE | dict(use_sliding_window=True, sliding_window=9),
            r"'max_window_layers' = 48 with a sliding window",
        ),
    ],
)
def test_unsupported_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config_data(LLAMA_31 | changes)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "mixtral"])
def test_a_part_of_the_head_is_not_exported_where_it_would_be_ignored(family):
    """transformers turns whole heads in these families, whatever the key says."""
    config = read_config_data(dict(model_type=family, **WIDE))
    half = lambda a: dataclasses.replace(a, rope=Rope(fraction=0.5))  # noqa: E731
    layers = (
        dataclasses.replace(x, attention=half(x.attention)) for x in config.layers
    )
    with pytest.raises(ValueError, match=r"'partial_rotary_factor' = 0.5"):
        write_config_data(dataclasses.replace(config, layers=tuple(layers)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spread_of_fresh_parameters_travels(family):
    """``initializer_range`` (of OPT: ``init_std``) is read and written."""
    kind, fields = next(v for v in CASES.values() if v[0] == family)
    read = read_config_data(dict(model_type=kind, initializer_range=0.006, **fields))
    config = dataclasses.replace(read, init_std=0.05)
    again = read_config_data(write_config_data(config))
    assert (read.init_std, again.init_std) == (0.006, 0.05)


def test_opt_350m_is_refused():
    small = dict(model_type="opt", vocab_size=9, hidden_size=8, num_hidden_layers=1)
    small |= dict(num_attention_heads=2, ffn_dim=8, activation_dropout=0.0)
    assert read_config_data(small).family == "opt"
    with pytest.raises(ValueError, match=r"'do_layer_norm_before' = False"):
        read_config_data(small | dict(do_layer_norm_before=False))
    with pytest.raises(ValueError, match=r"'word_embed_proj_dim' = 4|= 8; .*4"):
        read_config_data(small | dict(word_embed_proj_dim=4))
