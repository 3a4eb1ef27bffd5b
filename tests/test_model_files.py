"""Model files: damage is named before anything is built, and nothing half is left."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.model import Model, put
from jaxllm.core.weights import LowRank
from jaxllm.models import MLP, Attention, Layer, MoE, Norm, Rope, Transformer, init
from jaxllm.models.hub import (
    load_llama2c,
    load_model,
    read_config,
    rotary_halves,
    save_pretrained,
)
from jaxllm.models.hub.plan import make_plan
from jaxllm.models.hub.safetensors import INDEX, SINGLE, open_file, write_file

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6))
PLAIN = Layer(Attention(4, 2, 8), MLP(40))


def transformer(layer: Layer = PLAIN, **fields) -> Transformer:
    fields = dict(vocab_size=50, width=32, layers=(layer,) * 2, max_length=16) | fields
    return Transformer(**fields)


def random_model(config: Transformer) -> Model:
    """Normal parameters, drawn without compiling anything."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0)).params
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype)  # noqa: E731
    return Model(jax.tree.map(draw, shapes), config)


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(random_model(transformer()), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    model = random_model(transformer())
    return save_pretrained(model, tmp_path / "sharded", shard_bytes=20e3)


def rewrite(path, **changes) -> None:
    """Change tensors of a file; None removes one."""
    found = {n: np.array(t.read()) for n, t in open_file(path).items()} | changes
    write_file(path, {n: v for n, v in found.items() if v is not None})


def wrong(shape) -> np.ndarray:
    return np.zeros(shape, np.float32)


HEAD, NORM = "lm_head.weight", "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({NORM: None}, r"tensor 'model.norm.weight' is missing"),
        ({HEAD: None, NORM: None}, r"missing \(2 in all\)"),
        ({"extra.weight": wrong(3)}, r"unexpected tensor 'extra.weight'"),
        (
            {QUERY: wrong((32, 31))},
            r"q_proj.weight' is \[32, 31\], expected \[32, 32\]",
        ),
        (
            {NORM: np.full(32, np.inf, np.float32)},
            r"'model.norm.weight' has non-finite",
        ),
    ],
)
def test_tensors_are_checked(folder, changes, message):
    rewrite(folder / SINGLE, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_damaged_files_are_named(folder):
    path = folder / SINGLE
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[NORM]["dtype"] = "U4"
    typed = json.dumps(header).encode()
    cases = {
        r"tensor .* ends at byte": data[:-9],
        r"truncated or not safetensors: 5 bytes": data[:5],
        r"truncated or not safetensors": b"\xff" * 64,
        r"damaged header": data[:8] + b"x" * length + data[8 + length :],
        r"'model.norm.weight' has type U4.*quantized": (
            struct.pack("<Q", len(typed)) + typed + data[8 + length :]
        ),
    }
    for message, damaged in cases.items():
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            load_model(folder)
        assert SINGLE in str(error.value)


def test_shards_agree_with_their_index(sharded):
    load_model(sharded)
    index = json.loads((sharded / INDEX).read_text())
    first = index["weight_map"][NORM]
    broken = index["weight_map"] | {NORM: "../elsewhere.safetensors"}
    (sharded / INDEX).write_text(json.dumps({"weight_map": broken}))
    with pytest.raises(ValueError, match=r"points outside"):
        load_model(sharded)
    (sharded / INDEX).write_text(json.dumps(index))
    rewrite(sharded / first, **{NORM: None})
    with pytest.raises(ValueError, match=rf"'{NORM}' is missing in .*{first}"):
        load_model(sharded)
    (sharded / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"shard '{first}' is missing"):
        load_model(sharded)


def test_folders_without_weights(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert read_config(folder).width == 32
    with pytest.raises(FileNotFoundError, match=r"'pytorch_model.bin' is a pickle"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_model(folder)


def test_bare_checkpoints_and_old_buffers_load(tmp_path):
    """No "transformer." in front, and the causal mask stored as a tensor."""
    layer = Layer(
        Attention(4, 4, 8, rope=None, bias=True, out_bias=True),
        MLP(40, "gelu_tanh", gated=False, bias=True),
        Norm("layer"),
    )
    config = transformer(
        layer, norm=Norm("layer"), positions=16, tied=True, family="gpt2"
    )
    model = random_model(config)
    out = save_pretrained(model, tmp_path / "gpt2")
    found = {n: np.array(t.read()) for n, t in open_file(out / SINGLE).items()}
    bare = {n.removeprefix("transformer."): v for n, v in found.items()}
    write_file(out / SINGLE, bare | {"h.0.attn.bias": wrong((1, 1, 16, 16))})
    jax.tree.map(np.testing.assert_array_equal, load_model(out).params, model.params)
    write_file(out / SINGLE, bare | {"lm_head.weight": bare["wte.weight"]})
    load_model(out)
    write_file(out / SINGLE, bare | {"lm_head.weight": bare["wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'wte.weight'"):
        load_model(out)


def test_one_tensor_and_one_shard_in_host_memory(tmp_path):
    layer = Layer(Attention(4, 4, 64), MLP(512))
    config = transformer(layer, width=256, layers=(layer,) * 6)
    model = random_model(config)
    sizes = [x.nbytes for x in jax.tree.leaves(model.params)]
    make_plan(config)
    tracemalloc.start()
    out = save_pretrained(model, tmp_path / "model", shard_bytes=2 * max(sizes))
    assert tracemalloc.get_traced_memory()[1] < 4 * max(sizes)
    tracemalloc.reset_peak()
    load_model(out)
    assert tracemalloc.get_traced_memory()[1] < sum(sizes) + 3 * max(sizes)
    tracemalloc.stop()


def test_export_refuses_what_it_cannot_express(tmp_path):
    model, out = random_model(transformer()), tmp_path / "out"
    path = "layers.0.attn.q"
    low = LowRank(jnp.zeros((32, 2)), jnp.zeros((2, 32)))
    biased = model.params["layers"]["1"]["attn"]["o"] | {"bias": jnp.zeros(32)}
    narrow = dataclasses.replace(PLAIN, ffn=MLP(24))
    capped = dataclasses.replace(model.config, logit_softcap=3.0)
    uneven = transformer(layers=(PLAIN, narrow))
    alien = dataclasses.replace(model.config, family="mine")
    changed = lambda path, value: model.replace(  # noqa: E731
        params=put(model.params, path, value)
    )
    cases = [
        (TypeError, r"attn.q.weight is LowRank", changed(f"{path}.weight", low)),
        (
            ValueError,
            r"layers.1.attn.o.bias .*None",
            changed("layers.1.attn.o", biased),
        ),
        (ValueError, r"logit_softcap: 3.0 and None", model.replace(config=capped)),
        (ValueError, r"layers.1.ffn.hidden: 24 and 40", random_model(uneven)),
        (ValueError, r"family 'mine'.*llama", model.replace(config=alien)),
    ]
    for kind, message, refused in cases:
        with pytest.raises(kind, match=message):
            save_pretrained(refused, out)
    assert not list(tmp_path.iterdir())
    save_pretrained(model, out)
    with pytest.raises(FileExistsError, match="name a new folder"):
        save_pretrained(model, out)


def test_interrupted_export_leaves_nothing(tmp_path):
    class Broken:
        bos_id = eos_id = pad_id = None

        def save(self, folder):
            assert list(folder.iterdir())
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_pretrained(random_model(transformer()), tmp_path / "out", Broken())
    assert not list(tmp_path.iterdir())


def test_dtypes_and_neighbouring_pairs_travel(tmp_path):
    """A bfloat16 model with interleaved rotary pairs comes back in halves."""
    layer = Layer(Attention(4, 2, 8, rope=Rope(interleaved=True)), MLP(40))
    model = random_model(transformer(layer))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    out = save_pretrained(model.replace(params=narrow), tmp_path / "out")
    assert {t.code for t in open_file(out / SINGLE).values()} == {"BF16"}
    wanted = rotary_halves(model.replace(params=narrow))
    wide = load_model(str(out))
    assert wide.config == wanted.config
    for a, b in zip(*map(jax.tree.leaves, (wide.params, wanted.params)), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


def test_experts_are_stacked_in_their_order(tmp_path):
    moe = MoE(3, 2, 24, shared=MLP(20), shared_gate=True)
    layer = Layer(Attention(4, 2, 8, bias=True), moe)
    model = random_model(transformer(layer, family="qwen2_moe"))
    out = save_pretrained(model, tmp_path / "out", shard_bytes=4e3)
    assert len(list(out.glob("*.safetensors"))) > 9
    mine = load_model(out)
    assert mine.config == model.config
    jax.tree.map(np.testing.assert_array_equal, mine.params, model.params)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    file = json.loads((out / INDEX).read_text())["weight_map"][name]
    stored = open_file(out / file)[name].read()
    up = model.params["layers"]["1"]["moe"]["experts"]["up"]["weight"]
    np.testing.assert_array_equal(stored.T, up[2])


def llama2c_bytes(vocabulary: int = 11, change=None) -> bytes:
    """A tiny checkpoint: dim 8, hidden 12, 1 layer, 2 heads, 1 KV head, 6 positions."""
    header = struct.pack("<7i", 8, 12, 1, 2, 1, vocabulary, 6)
    rows = abs(vocabulary)
    count = rows * 8 + 8 + 64 + 32 + 32 + 64 + 8 + 3 * 96 + 8 + 24
    count += rows * 8 if vocabulary < 0 else 0
    values = np.linspace(-1, 1, count, dtype=np.float32)
    if change is not None:
        values[change] = np.nan
    return header + values.tobytes()


def test_llama2c_heads_are_tied_by_the_sign(tmp_path):
    for sign in (1, -1):
        (tmp_path / "m.bin").write_bytes(llama2c_bytes(sign * 11))
        model = load_model(tmp_path / "m.bin", dtype="bfloat16")
        assert model.config == read_config(str(tmp_path / "m.bin"), "bfloat16")
        assert model.config.tied == (sign > 0) == ("head" not in model.params)
        assert jax.eval_shape(model, TOKENS[:, :6]).shape == (2, 6, 11)
        assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize(
    "data, message",
    [
        (b"1234", "truncated: it has no header"),
        (llama2c_bytes()[:-4], "truncated: .* expected"),
        (llama2c_bytes() + b"1234", "longer than its header"),
        (struct.pack("<7i", 0x616B3432, 1, 8, 12, 1, 2, 1), "versioned"),
        (struct.pack("<7i", 8, 12, 1, 3, 1, 11, 6), "dim 8 / heads 3"),
        (struct.pack("<7i", 8, -12, 1, 2, 1, 11, 6), "hidden is -12"),
        (llama2c_bytes(change=92), "'layers.*.attn_norm.scale' has non-finite"),
    ],
)
def test_llama2c_refuses_damage(tmp_path, data, message):
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_llama2c(tmp_path / "m.bin")


def test_missing_model_names_what_is_accepted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"builtin:tiny.*hf:owner/name"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"int8.*float32, bfloat16"):
        load_model("builtin:tiny", dtype="int8")


def test_hub_models_are_fetched_by_name(folder, monkeypatch):
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision, "config.json" in allow_patterns))
        if name == "owner/none":
            raise OSError("no route")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    config = read_config("hf:owner/name")
    assert load_model("hf://owner/name@v2").config == config
    assert asked == [("owner/name", None, True), ("owner/name", "v2", True)]
    with pytest.raises(ConnectionError, match=r"'owner/none'.*no route.*builtin:tiny"):
        load_model("hf:owner/none")
    with pytest.raises(ValueError, match="needs the name of a model"):
        load_model("hf:")
