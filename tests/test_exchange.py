"""Compressed models leave the house and come back; others read the same values.

Readers that we did not write: the ``gguf`` package, ``compressed-tensors`` and
``transformers``. GPTQ and AWQ are unpacked here in NumPy from their published layouts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import compose, where
from jaxllm.core.batch import Batch
from jaxllm.core.formats import Integer
from jaxllm.core.model import Model, get, put, with_weight
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest
from jaxllm.core.splits import low_rank
from jaxllm.core.weights import (
    Permutation,
    Quantized,
    Sparse,
    Transformed,
    Weight,
    materialize,
)
from jaxllm.core.weights.blockwise import Blockwise
from jaxllm.experiment.export import expanded
from jaxllm.methods import hqq, nf4, rtn, smoothquant, wanda
from jaxllm.models import MLP, Attention, Layer, MoE, Norm, Rope, Transformer, init
from jaxllm.models.config import RopeScaling
from jaxllm.models.exchange import export_model
from jaxllm.models.exchange.compressed_tensors import CompressedTensors
from jaxllm.models.exchange.gguf_blocks import BLOCKS
from jaxllm.models.exchange.gguf_names import read_metadata
from jaxllm.models.exchange.words import from_words, to_words
from jaxllm.models.hub import load_model, read_config
from jaxllm.models.hub.plan import make_plan

TOKENS = np.arange(24).reshape(2, 12)
PLAIN = Layer(Attention(4, 2, 16), MLP(96))
symmetric = functools.partial(rtn, symmetric=True)


def model(layer: Layer = PLAIN, width: int = 64, **fields) -> Model:
    fields = dict(vocab_size=96, layers=(layer,) * 2, max_length=32) | fields
    made = init(Transformer(width=width, **fields), jax.random.key(0))
    grown = jax.tree.map(lambda x: x * (4 if x.ndim > 1 else 1), made.params)
    return made.replace(params=grown)


def assert_equal(mine: Model, other: Model) -> None:
    """The same architecture, weight types and bits."""
    assert mine.config == other.config
    assert jax.tree.structure(mine.params) == jax.tree.structure(other.params)
    jax.tree.map(np.testing.assert_array_equal, mine.params, other.params)


def dense(w) -> np.ndarray:
    """What a weight stands for, as others store it: [out, in]."""
    return np.asarray(materialize(w)).T


def close(mine: Model, logits: np.ndarray) -> None:
    ours = np.asarray(mine(jnp.asarray(TOKENS)))
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def hf():
    """The optional other half: pip install 'jaxllm[hf]'."""
    pytest.importorskip("torch", reason="needs the extra 'hf'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def their_logits(hf, folder, **options) -> np.ndarray:
    import torch

    options = dict(dtype="float32", attn_implementation="eager") | options
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_a_stream_of_bits(bits):
    """Code i is bits i b to i b + b - 1 of the line, as one long integer says."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 37), np.uint8)
    words = to_words(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32))
    for line, found in zip(codes, words, strict=True):
        whole = sum(int(code) << i * bits for i, code in enumerate(line))
        assert whole == int.from_bytes(found.astype("<i4").tobytes(), "little")
    np.testing.assert_array_equal(from_words(words, bits, 37), codes)
    np.testing.assert_array_equal(
        from_words(to_words(codes.T, bits, 0), bits, 37, 0), codes.T
    )


# The published layouts of GPTQ and AWQ, apart from the writers.


def bit_fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes along the last axis, from one integer per line."""
    count = words.shape[-1] * 32 // bits
    lines = words.reshape(-1, words.shape[-1]).astype("<i4")
    whole = [int.from_bytes(line.tobytes(), "little") for line in lines]
    codes = [[n >> i * bits & (1 << bits) - 1 for i in range(count)] for n in whole]
    return np.array(codes).reshape(*words.shape[:-1], count)


def read_gptq(tensors, name: str, settings: dict) -> np.ndarray:
    """[in, out]: scales[g] (code - zero - 1) with g = g_idx; no - 1 in version 2."""
    qweight, qzeros, scales, groups = (
        tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert (qweight.dtype, qzeros.dtype, scales.dtype) == (np.int32, np.int32, "<f2")
    codes = bit_fields(qweight.T, settings["bits"]).T
    zero = bit_fields(qzeros, settings["bits"])
    zero = zero + (settings["checkpoint_format"] == "gptq")
    values = scales[groups].astype(np.float32)
    return values * (codes - zero[groups]).astype(np.float32)


def read_awq(tensors, name: str, settings: dict) -> np.ndarray:
    """[in, out]: eight codes to a word, output 8 j + i in the nibble of rank i."""
    rank = (0, 4, 1, 5, 2, 6, 3, 7)
    nibbles = []
    for part in ("qweight", "qzeros"):
        words = tensors[f"{name}.{part}"]
        eights = np.stack([words >> 4 * place & 15 for place in rank], -1)
        nibbles.append(eights.reshape(len(words), -1))
    codes, zero = nibbles
    size = len(codes) // len(zero)
    assert settings["group_size"] in (size, -1)
    scales = tensors[f"{name}.scales"].astype(np.float32)
    return np.repeat(scales, size, 0) * (codes - np.repeat(zero, size, 0))


def read_library(tensors, name: str, settings: dict) -> np.ndarray:
    """[in, out] as the compressed-tensors package decompresses it."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(settings)
    groups = config.config_groups.values()
    (scheme,) = (g for g in groups if name in g.targets or g.targets == ["Linear"])
    parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point")
    state = {
        part: torch.tensor(tensors[f"{name}.{part}"])
        for part in (*parts, "weight_shape")
        if f"{name}.{part}" in tensors
    }
    made = BaseCompressor.get_value_from_registry(scheme.format)
    return made.decompress(state, scheme)["weight"].numpy().T


READERS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_library}
MLPS, ATTENTION = "layers.*.mlp", "layers.*.attn"
# name: (format, what makes the model)
FOLDERS = {
    "gptq_int2": ("gptq", symmetric(bits=2, group_size=16)),
    "gptq_int3": ("gptq", rtn(bits=3, group_size=32)),
    "gptq_int4": ("gptq", symmetric(bits=4, group_size=32)),
    "gptq_int8_rows": ("gptq", symmetric(bits=8, group_size=None)),
    "gptq_short_group": ("gptq", rtn(bits=4, group_size=40)),
    "gptq_sparse": ("gptq", compose(wanda("2:4"), rtn(bits=4, group_size=32))),
    "gptq_some": ("gptq", where(MLPS, symmetric(bits=4, group_size=32))),
    "gptq_head": ("gptq", where((MLPS, "head"), rtn(bits=4, group_size=32))),
    "awq": ("awq", rtn(bits=4, group_size=32)),
    "awq_rows": ("awq", where(ATTENTION, rtn(bits=4, group_size=None))),
    "ct_int4": ("compressed-tensors", rtn(bits=4, group_size=32)),
    "ct_int3": ("compressed-tensors", symmetric(bits=3, group_size=None)),
    "ct_w8a8": ("compressed-tensors", smoothquant(None, bits=8)),
    "ct_mixed": (
        "compressed-tensors",
        compose(
            where(MLPS, symmetric(bits=8, group_size=32)),
            where(ATTENTION, symmetric(bits=4, group_size=None)),
        ),
    ),
}


@pytest.fixture(scope="module", params=FOLDERS)
def case(request, tmp_path_factory):
    """(format, compressed model, folder), in several shards."""
    format, transform = FOLDERS[request.param]
    layer = (
        Layer(Attention(4, 2, 16, bias=True), MLP(96)) if format == "gptq" else PLAIN
    )
    fields = dict(family="qwen2") if format == "gptq" else {}
    small = transform(model(layer, **fields), [Batch(jnp.asarray(TOKENS))])
    folder = tmp_path_factory.mktemp(request.param) / "out"
    return format, small, export_model(small, folder, format, shard_bytes=3e4)


def packed(small: Model) -> dict:
    """Their name of each compressed linear map: our weight."""
    plan = make_plan(small.config)
    found = {e.theirs: get(small.params, e.parts[0]) for e in plan.values()}
    kept = {n: w for n, w in found.items() if isinstance(w, Weight)}
    return {name.removesuffix(".weight"): w for name, w in kept.items()}


def stored(folder) -> tuple[dict, dict]:
    """All tensors by the safetensors package, and the quantization_config."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found, json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]


def test_packed_folders_come_back(case):
    """Shards, configuration, weight types and bits; a mask becomes codes of zero."""
    _, small, folder = case
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load_model(str(folder))
    assert read_config(folder) == again.config == small.config
    if any(isinstance(w, Sparse) for w in packed(small).values()):
        small, again = expanded(small), expanded(again)
    assert_equal(again, small)


def test_other_readers_see_the_same_values(case):
    """Bit for bit, in float32."""
    format, small, folder = case
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="needs the extra 'hf'")
    tensors, settings = stored(folder)
    assert settings["quant_method"] == format
    modules = packed(small)
    assert modules
    for name, w in modules.items():
        theirs = READERS[format](tensors, name, settings)
        np.testing.assert_array_equal(dense(w).T, theirs, err_msg=name)


# transformers 5.23 reads zero points only when it dequantizes, and then one scheme.
@pytest.mark.parametrize("name, dequantize", [("ct_int4", True), ("ct_mixed", False)])
def test_transformers_computes_the_same(hf, name, dequantize, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the extra 'hf'")
    format, transform = FOLDERS[name]
    small = transform(model())
    folder = export_model(small, tmp_path / "out", format)
    config = hf.CompressedTensorsConfig(dequantize=True)
    options = dict(quantization_config=config) if dequantize else {}
    close(small, their_logits(hf, folder, **options))


def test_the_most_specific_target_has_the_scheme():
    """A name before a pattern before the class, whatever the order of the groups."""
    eight, four = (
        dict(weights=dict(num_bits=bits, strategy="channel", symmetric=True))
        for bits in (8, 4)
    )
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    cases = {
        ("Linear", "re:.*down_proj$"): [(down, 8), (up, 4)],
        ("re:.*proj$", down): [(down, 8), (up, 4)],
        (down, "Linear"): [(down, 4), (up, 8)],
        ("re:.*up.*", "re:.*down.*"): [(down, 8), (up, 4)],
        ("re:.*u.*", "re:.*_proj"): [(up, 8)],
    }
    for (first, second), expected in cases.items():
        groups = dict(a=four | dict(targets=[first]), b=eight | dict(targets=[second]))
        read = CompressedTensors().reader(dict(config_groups=groups))
        assert [(n, read(n, 64, 64).bits) for n, _ in expected] == expected


FUSED = {
    "phi3": PLAIN,
    "gpt2": Layer(
        Attention(4, 4, 16, rope=None, bias=True, out_bias=True),
        MLP(96, "gelu_tanh", gated=False, bias=True),
        Norm("layer"),
    ),
    "qwen3_moe": Layer(Attention(4, 2, 16, qk_norm=Norm()), MoE(3, 2, 32)),
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_stacked_weights_come_back(family, tmp_path):
    layer = FUSED[family]
    fields = dict(norm=layer.norm, family=family)
    if family == "gpt2":
        fields |= dict(positions=32, tied=True)
    small = rtn(bits=4, group_size=32)(model(layer, **fields))
    folder = export_model(small, tmp_path / "out", "gptq")
    assert_equal(load_model(folder), small)


def test_rotary_pairs_leave_as_halves(tmp_path):
    layer = Layer(Attention(4, 2, 16, rope=Rope(interleaved=True)), MLP(96))
    small = rtn(bits=4, group_size=32)(model(layer))
    again = load_model(export_model(small, tmp_path / "out", "awq"))
    assert not again.config.layers[0].attention.rope.interleaved
    close(again, np.asarray(small(TOKENS)))


def test_activation_order_is_a_permutation(tmp_path):
    """Groups of inputs that are no neighbours: g_idx there, a permutation here."""
    small, path = symmetric(bits=4, group_size=16)(model()), "layers.1.mlp.down"
    order = np.random.default_rng(0).permutation(96)
    inner = get(small.params, f"{path}.weight")
    w = Transformed(Permutation(jnp.asarray(order, jnp.int32)), inner)
    small = with_weight(small, path, w)
    folder = export_model(small, tmp_path / "out", "gptq")
    tensors, settings = stored(folder)
    assert settings["desc_act"]
    theirs = read_gptq(tensors, "model.layers.1.mlp.down_proj", settings)
    np.testing.assert_array_equal(dense(w).T, theirs)
    again = load_model(folder)
    back = dense(get(again.params, f"{path}.weight"))
    np.testing.assert_array_equal(back, dense(w))
    with pytest.raises(ValueError, match=r"layers.1.mlp.down.weight .*another order"):
        export_model(small, tmp_path / "no", "awq")


CORRECTED = rtn(bits=4, group_size=32, correct=low_rank(2))
REFUSED = [
    (
        "gptq",
        nf4(),
        r"q.weight has codes of nf4.*made by: nf4\(.*gptq accepts integers",
    ),
    ("gptq", symmetric(bits=5, group_size=32), r"codes of 5 bits.*2, 3, 4 or 8 bits"),
    ("gptq", hqq(bits=4, group_size=32), r"real-valued zero points"),
    ("gptq", CORRECTED, r"attn.q.weight is Sum\(Quantized.*LowRank.*low_rank"),
    ("gptq", smoothquant(None, bits=8), r"rounds its inputs"),
    ("gptq", wanda("2:4"), r"attn.q.weight is Sparse"),
    ("awq", symmetric(bits=8, group_size=32), r"8 bits .*awq accepts integers of 4"),
    ("awq", rtn(bits=4, group_size=24), r"64 x 64 in groups 24"),
    (
        "awq",
        FOLDERS["ct_mixed"][1],
        r"gate.weight has codes of 8 bits .*made by: where",
    ),
    ("gptq", FOLDERS["ct_mixed"][1], r"int8 in groups of 32 .*int4 in one.*one number"),
    ("awq", where("head", rtn(bits=4, group_size=32)), r"head.weight .*the head"),
    ("compressed-tensors", rtn(bits=4, group_size=40), r"64 inputs in groups of 40"),
    ("compressed-tensors", rtn(format="e2m1", group_size=32), r"codes of e2m1"),
    ("gguf", rtn(bits=4, group_size=32), r"is asymmetric int4 .*symmetric int4 in gr"),
    ("gguf", symmetric(bits=4, group_size=64), r"int4 in groups of 64.*\(Q4_0\)"),
    ("gguf", nf4(), r"q.weight is Quantized .*made by: nf4"),
    ("marlin", rtn(), r"'marlin'; accepted: gptq, awq, compressed-tensors, gguf"),
]


@pytest.mark.parametrize("format, transform, message", REFUSED)
def test_what_a_format_cannot_express_is_refused(tmp_path, format, transform, message):
    """Before anything is written, naming the layer, what made it, what is accepted."""
    small = transform(model(), [Batch(jnp.asarray(TOKENS))])
    with pytest.raises((TypeError, ValueError), match=message):
        export_model(small, tmp_path / "out.gguf", format)
    assert not list(tmp_path.iterdir())


def test_scales_outside_float16_and_dense_models_are_refused(tmp_path):
    small = symmetric(bits=4, group_size=32)(model())
    path = "layers.1.mlp.up"
    w = get(small.params, f"{path}.weight")
    tiny = with_weight(small, path, dataclasses.replace(w, scale=w.scale * 1e-9))
    for format in ("gptq", "awq"):
        with pytest.raises(ValueError, match=r"layers.1.mlp.up.weight .*float16"):
            export_model(tiny, tmp_path / "out", format)
    with pytest.raises(TypeError, match=r"layers.1.mlp.up.weight .*float16 scales"):
        export_model(tiny, tmp_path / "out.gguf", "gguf")
    with pytest.raises(ValueError, match="no weight is compressed"):
        export_model(model(), tmp_path / "out", "gptq")
    embedded = put(small.params, "embed.weight", w_of(96, 64))
    with pytest.raises(ValueError, match=r"embed.weight is looked up"):
        export_model(small.replace(params=embedded), tmp_path / "out", "awq")
    assert not list(tmp_path.iterdir())


def w_of(outputs: int, inputs: int, bits: int = 4) -> Quantized:
    """A random quantized weight [inputs, outputs] in groups of 32."""
    values = np.random.default_rng(0).normal(0, 1, (inputs, outputs))
    solve = nearest(Grid(Integer(bits, True), 32))
    return solve(jnp.asarray(values, jnp.float32), None)


@pytest.mark.parametrize(
    "format, changes, message",
    [
        ("gptq", dict(quant_method="bitsandbytes"), r"'bitsandbytes'; accepted: gptq"),
        ("gptq", dict(bits=5), r"'bits' = 5; accepted: 2 or 3 or 4 or 8"),
        ("gptq", dict(checkpoint_format="marlin"), r"'checkpoint_format' = 'marlin'"),
        ("gptq", dict(group_size=16), r"qzeros' is \[2, 8\], expected \[4, 8\]"),
        ("gptq", dict(dynamic={"+:.*": {"bits": 8}}), r"dynamic '\+:\.\*' changes"),
        ("awq", dict(version="gemv"), r"'version' = 'gemv'; accepted: 'gemm'"),
        ("awq", dict(zero_point=False), r"'zero_point' = False"),
        ("compressed-tensors", dict(config_groups={}), r"no group has the target"),
        ("compressed-tensors", dict(format="marlin-24"), r"'format' = 'marlin-24'"),
    ],
)
def test_settings_that_we_do_not_read_are_named(tmp_path, format, changes, message):
    small = symmetric(bits=4, group_size=32)(model())
    folder = export_model(small, tmp_path / "out", format)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"] |= changes
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    assert read_config(folder) == small.config


def test_one_shard_in_host_memory(tmp_path):
    layer = Layer(Attention(4, 4, 64), MLP(2048))
    small = rtn(bits=4, group_size=128)(model(layer, 256, layers=(layer,) * 6))
    largest = 256 * 2048  # codes of one weight, unpacked; tracing takes megabytes too
    make_plan(small.config)
    for format, path in (("gptq", "out"), ("awq", "awq")):
        tracemalloc.start()
        export_model(small, tmp_path / path, format, shard_bytes=largest)
        assert tracemalloc.get_traced_memory()[1] < 12 * largest
        tracemalloc.stop()


# GGUF

RULES = {
    "Q4_0": nearest(Grid(Integer(4, True), 32)),
    "Q8_0": nearest(Grid(Integer(8, True), 32)),
    "Q6_K": nearest(
        Grid(Integer(6, True), 16, scale_format=Integer(8, True), scale_block=16)
    ),
}
WIDE = Layer(Attention(4, 2, 64), MLP(512))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.kind.name)
def test_blocks_are_those_of_ggml(block):
    """The gguf package dequantizes our bytes to our values, and we take them back."""
    quants = pytest.importorskip("gguf.quants", reason="needs the extra 'hf'")
    from gguf import GGMLQuantizationType

    values = np.random.default_rng(0).normal(0, 1, (512, 24)).astype(np.float32)
    if block.kind.name != "Q6_K":
        values[:256, 0] = 0  # groups of nothing have scales below float16's range
    rule = RULES.get(block.kind.name)
    w = rule(jnp.asarray(values), None) if rule else block.round(values, "float32")
    assert [b for b in BLOCKS if b.fits(w)] == [block]
    rows = block.write(w)
    theirs = quants.dequantize(rows, GGMLQuantizationType[block.kind.name])
    np.testing.assert_array_equal(theirs, dense(w))
    again = block.read(rows, 512, "float32")
    assert jax.tree.structure(again) == jax.tree.structure(w)
    np.testing.assert_array_equal(dense(again), dense(w))
    steps = 15 if block.kind.name.startswith("Q4") else 60
    assert np.abs(dense(w).T - values).max() < 8 / steps


GGUF = {
    "q4_0": (symmetric(bits=4, group_size=32), None, {"F32", "Q4_0"}),
    "mixed": (
        compose(
            where(MLPS, symmetric(bits=8, group_size=32)),
            where(ATTENTION, symmetric(bits=4, group_size=32)),
        ),
        None,
        {"F32", "Q4_0", "Q8_0"},
    ),
    "q4_k": (lambda model: model, "q4_k", {"F32", "Q4_K"}),
}


@pytest.mark.parametrize("name", GGUF)
def test_transformers_reads_gguf(hf, name, tmp_path):
    """Equal logits; the gguf package sees the types and, bit for bit, the values."""
    gguf = pytest.importorskip("gguf", reason="needs the extra 'hf'")
    pytest.importorskip("accelerate", reason="needs the extra 'hf'")
    transform, rounding, kinds = GGUF[name]
    small = transform(model(WIDE, 256))
    file = export_model(small, tmp_path / "m.gguf", "gguf", round_to=rounding)
    again = load_model(file)
    if rounding is None:
        assert_equal(again, small)
    found = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert {t.tensor_type.name for t in found.values()} == kinds
    for layer, values in ((0, "ffn_down"), (1, "attn_v"), (1, "attn_output")):
        there = found[f"blk.{layer}.{values}.weight"]
        ours = dict(ffn_down="mlp.down", attn_v="attn.v", attn_output="attn.o")[values]
        mine = get(again.params, f"layers.{layer}.{ours}.weight")
        theirs = gguf.quants.dequantize(there.data, there.tensor_type)
        np.testing.assert_array_equal(theirs, dense(mine))
    close(again, their_logits(hf, tmp_path, gguf_file="m.gguf"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gguf_keeps_the_function(family, interleaved, tmp_path):
    """Biases, norms of q and k, ties, and rotary pairs of both kinds."""
    more = dict(qwen2=dict(bias=True), qwen3=dict(qk_norm=Norm(eps=1e-6)), llama={})
    norm = Norm(eps=1e-6)
    rope = Rope(theta=5e5, interleaved=interleaved)
    layer = Layer(Attention(4, 2, 16, rope=rope, **more[family]), MLP(96), norm)
    fields = dict(norm=norm, tied=family == "qwen3", family=family)
    small = symmetric(bits=8, group_size=32)(model(layer, **fields))
    again = load_model(export_model(small, tmp_path / "m.gguf", "gguf"))
    assert not again.config.layers[0].attention.rope.interleaved
    if not interleaved:
        assert_equal(again, small)
    close(again, np.asarray(small(TOKENS)))


def test_stories_as_gguf(stories, hf, tmp_path):
    """A pretrained model whose widths are not all whole blocks: those stay dense."""
    pytest.importorskip("accelerate", reason="needs the extra 'hf'")
    names = ("layers.*.attn", "layers.*.mlp.gate", "layers.*.mlp.up", "embed")
    small = where(names, symmetric(bits=8, group_size=32))(stories)
    file = export_model(small, tmp_path / "m.gguf", "gguf")
    assert file.stat().st_size < 0.6 * sum(x.nbytes for x in jax.tree.leaves(stories))
    close(small, their_logits(hf, tmp_path, gguf_file="m.gguf"))
    with pytest.raises(TypeError, match=r"mlp.down.weight is symmetric int8 .*of 32"):
        export_model(symmetric(8, 32)(stories), tmp_path / "n.gguf", "gguf")


def test_gguf_refuses_what_it_does_not_know(tmp_path):
    small = symmetric(bits=4, group_size=32)(model())
    file = export_model(small, tmp_path / "m.gguf", "gguf")
    data = file.read_bytes()
    cases = {
        r"no GGUF file": b"GGML" + data[4:],
        r"version 9; accepted: 2, 3": data[:4] + b"\x09" + data[5:],
        r"truncated in its header": data[:300],
        r"is truncated: '.*' goes beyond": data[:-99],
        r"'lllma'; accepted: llama": data.replace(b"llama", b"lllma"),
        r"missing tensor 'blk.1.attn_q": data.replace(b"blk.1.attn_q", b"blk.7.attn_q"),
        r"lacks 'llama.block_count'": data.replace(b"block_count", b"block_xount"),
    }
    for message, damaged in cases.items():
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_model(file)
    with pytest.raises(FileExistsError, match="name a new file"):
        export_model(small, file, "gguf")
    with pytest.raises(ValueError, match=r"ends in .gguf"):
        export_model(small, tmp_path / "folder", "gguf")
    with pytest.raises(ValueError, match=r"round_to 'q2_k'; accepted: None, q4_k"):
        export_model(small, tmp_path / "n.gguf", "gguf", round_to="q2_k")
    windowed = Layer(Attention(4, 2, 16, window=5), MLP(96))
    with pytest.raises(ValueError, match=r"gguf cannot express .*window: 5"):
        export_model(model(windowed, family="mistral"), tmp_path / "n.gguf", "gguf")
    with pytest.raises(ValueError, match=r"family 'gpt2'; accepted: llama, mistral"):
        export_model(model(family="gpt2"), tmp_path / "n.gguf", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


CPP = dict(  # what llama.cpp writes of a Qwen2
    context_length=64,
    embedding_length=32,
    block_count=1,
    feed_forward_length=64,
    **{"attention.head_count": 4, "attention.head_count_kv": 2},
    **{"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6},
)


def from_metadata(name: str = "qwen2", **keys):
    """The first attention of a file with these keys."""
    found = {f"{name}.{key}": value for key, value in (CPP | keys).items()}
    found |= {"general.architecture": name, "tokenizer.ggml.tokens": ["a", "b"]}
    found = {key: value for key, value in found.items() if value is not None}
    return read_metadata(found, frozenset(), "float32").layers[0].attention


def test_gguf_keys_that_llama_cpp_leaves_out():
    """Heads are width / heads, all of which turns; a scaling is linear."""
    assert from_metadata().head_dim == from_metadata("qwen3").head_dim == 8
    assert from_metadata(**{"attention.key_length": 16}).head_dim == 16
    assert from_metadata(**{"rope.freq_base": None}).rope == Rope()
    assert from_metadata(**{"attention.head_count_kv": None}).kv_heads == 4
    linear, kind, factor = (
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
    )
    stretched = RopeScaling("linear", 4.0)
    for keys in ({factor: 4.0}, {linear: 4.0}, {factor: 4.0, kind: "linear"}):
        assert from_metadata(**keys).rope == Rope(1e6, scaling=stretched)
    for keys in ({factor: 0.0}, {factor: 4.0, kind: "none"}, {kind: "linear"}):
        assert from_metadata(**keys).rope == Rope(1e6)


def test_gguf_keys_that_change_nothing_are_accepted():
    keys = ("expert_count", "attention.sliding_window", "attention.scale")
    plain = from_metadata(**dict.fromkeys(keys, 0), logit_scale=1.0)
    more = {"attention.causal": True, "rope.scaling.finetuned": True}
    assert plain == from_metadata(**more) == from_metadata()


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention.sliding_window", 4),
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("attention.value_length", 16),
        ("rope.dimension_count", 4),
        ("rope.dimension_sections", [2, 1, 1, 0]),
        ("rope.scaling.attn_factor", 2.0),
        ("expert_count", 8),
        ("logit_scale", 0.1),
    ],
)
def test_gguf_keys_that_change_the_function_are_named(key, value):
    with pytest.raises(ValueError, match=rf"'qwen2.{key}' = .*; accepted: "):
        from_metadata(**{key: value})


@pytest.mark.parametrize("features", [64, 72])
def test_a_constant_per_block_is_a_weight(features):
    values = (
        np.random.default_rng(0)
        .normal(0, 1, (5, -(-features // 32)))
        .astype(np.float32)
    )
    w = Blockwise(jnp.asarray(values), 5, 32, features)
    whole = np.repeat(values, 32, 1)[:, :features].T
    assert w.shape == whole.shape == (features, 5)
    np.testing.assert_array_equal(w.materialize(), whole)
    x = np.random.default_rng(1).normal(0, 1, (2, 3, features)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(w.dot)(x), x @ whole, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(w.rows(jnp.array([[3], [0]])), whole.T[[[3], [0]]])
