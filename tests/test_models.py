"""The transformer keeps its laws in every configuration.

Families are configurations: those below cover what differs between them, by feature.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import weights
from jaxllm.core.formats import ActivationFormat, Log2, float_format
from jaxllm.core.model import Model, get, paths, put
from jaxllm.core.stats import Stats
from jaxllm.models import (
    MLP,
    Attention,
    Layer,
    MoE,
    Norm,
    Rope,
    Transformer,
    blocks,
    init,
)
from jaxllm.models.attention import attend
from jaxllm.models.config import RopeScaling
from jaxllm.models.hub import rotary_halves
from jaxllm.models.layers import Pass, rotate

WIDTH, VOCABULARY, LENGTH = 32, 61, 12


def make(layer: Layer, count: int = 2, **fields) -> Transformer:
    fields = dict(vocab_size=VOCABULARY, width=WIDTH, init_std=0.3) | fields
    return Transformer(layers=(layer,) * count, max_length=64, **fields)


def attention(**fields) -> Attention:
    return Attention(**(dict(heads=4, kv_heads=2, head_dim=8) | fields))


LAYER_NORM, PLUS_ONE = Norm("layer"), Norm(plus_one=True)
RELU = MLP(40, "relu", gated=False, bias=True)
BIASED = attention(kv_heads=4, bias=True, out_bias=True)
SHARED = MoE(4, 2, 24, normalize=False, shared=MLP(20), shared_gate=True)
CONFIGS = {
    "grouped": make(Layer(attention(), MLP(40)), tied=True),
    "interleaved": make(Layer(attention(rope=Rope(interleaved=True)), MLP(40))),
    "window": make(Layer(attention(window=4, bias=True), MLP(40))),
    "qk_norm": make(Layer(attention(qk_norm=Norm(), head_dim=16), MLP(40))),
    "sandwich": make(
        Layer(attention(softcap=5.0, scale=0.3), MLP(40, "gelu_tanh"), PLUS_ONE, True),
        norm=PLUS_ONE,
        embed_scale=WIDTH**0.5,
        logit_softcap=8.0,
        tied=True,
    ),
    "learned": make(
        Layer(dataclasses.replace(BIASED, rope=None), RELU, LAYER_NORM),
        norm=LAYER_NORM,
        positions=64,
        position_offset=2,
    ),
    "parallel": make(
        Layer(
            dataclasses.replace(BIASED, rope=Rope(fraction=0.5)),
            MLP(40, "gelu", gated=False, bias=True),
            LAYER_NORM,
            parallel=True,
        ),
        norm=LAYER_NORM,
    ),
    "rounded": make(Layer(attention(probabilities=Log2(4)), MLP(40))),
    "experts": make(Layer(attention(), MoE(4, 2, 24))),
    "shared_expert": make(Layer(attention(), SHARED)),
    "unlike_layers": dataclasses.replace(
        make(Layer(attention(), MLP(40))),
        layers=(
            Layer(attention(), MLP(40)),
            Layer(attention(), MLP(40)),
            Layer(attention(heads=2, kv_heads=1), MLP(24)),
            Layer(None, MLP(16, "relu2", gated=False)),
            Layer(attention(window=3), None),
        ),
    ),
}
ROTATABLE = ("grouped", "interleaved", "qk_norm", "learned", "experts", "shared_expert")


def random_model(config: Transformer, seed: int = 0) -> Model:
    """Random parameters, also the norms' and biases', which start as ones and zeros."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        start = 1.0 if path[-1].key == "scale" else 0.0
        wide = leaf.shape[-2] if leaf.ndim > 1 else 16
        return jnp.asarray(start + noise / wide**0.5)

    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0)).params
    return Model(jax.tree_util.tree_map_with_path(draw, shapes), config)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, VOCABULARY, (2, LENGTH)))
ROW = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)


def close(a, b, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the largest value."""
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


# Little optimisation: these compilations are many and run once.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@quick
def compiled(model, tokens, positions, segments):
    return model(tokens, positions=positions, segments=segments)


def forward(model, tokens=TOKENS, positions=ROW, segments=None):
    """Logits; always the same shapes, so that each configuration compiles once."""
    segments = jnp.ones_like(tokens) if segments is None else segments
    return compiled(model, tokens, positions, segments)


@quick
def cached(model, tokens, positions, segments, cache):
    return model(tokens, positions=positions, segments=segments, cache=cache)


@pytest.mark.parametrize("name", ["grouped", "window", "learned", "experts"])
def test_causality(name):
    """d logits[i] / d hidden[j] is zero for j > i, and not for j = i."""
    model = random_model(CONFIGS[name])
    config, params = model.config, model.params
    mix = jnp.asarray(np.random.default_rng(3).normal(size=VOCABULARY), jnp.float32)

    @quick
    @jax.grad
    def gradient(hidden, i):
        for path, block in config.blocks():
            hidden = block.apply(get(params, path), hidden, Pass(ROW[:1]))[0][0]
        return config.head(params, hidden)[0, i] @ mix

    hidden = config.embed(params, TOKENS[:1], ROW[:1])
    for i in range(LENGTH):
        reach = jnp.abs(gradient(hidden, i))[0].max(-1)
        assert float(reach[i + 1 :].max(initial=0.0)) == 0.0
        assert float(reach[i]) > 1e-3


def test_windows_end():
    """Two layers of window 4 see 7 positions: input 0 reaches output 6, not 7."""
    model = random_model(CONFIGS["window"])
    other = TOKENS.at[:, 0].add(1) % VOCABULARY
    moved = jnp.abs(forward(model) - forward(model, other)).max((0, 2))
    assert float(moved[6]) > 1e-4
    assert float(moved[7:].max()) == 0.0


@pytest.mark.parametrize("name", ["experts", "unlike_layers"])
def test_scanned_equals_unrolled(name):
    model = random_model(CONFIGS[name])
    run = quick(model.config.forward, static_argnames=("scan", "remat"))
    cache = model.config.empty_cache(2, LENGTH)
    logits, filled = run(model.params, TOKENS, scan=True, remat=True, cache=cache)
    close(logits, forward(model))
    last = {path: jax.tree.map(lambda x: x[:, -1], e) for path, e in filled.items()}
    assert filled.keys() == cache.keys()
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(last))


@pytest.mark.parametrize("name", ["experts", "unlike_layers"])
def test_equal_blocks_share_a_program(name):
    model, before = random_model(CONFIGS[name]), blocks._compiled._cache_size()
    logits = model.config.forward(model.params, TOKENS, stepwise=True)
    close(logits, forward(model))
    kinds = {block for _, block in model.config.blocks()}
    assert blocks._compiled._cache_size() - before == len(kinds)


def test_cache_equals_full_pass(model):
    """Chunks padded on the left, whose padding must not touch the slots before it."""
    expected, done = forward(model), np.zeros(2, int)
    cache = model.config.empty_cache(2, LENGTH)
    for lengths in ([4, 3], [3, 2], [1, 1], [1, 1]):
        first = 4 - np.array(lengths)[:, None]
        at = np.maximum(done[:, None] + np.arange(4) - first, 0)
        real = jnp.asarray(np.arange(4) >= first, jnp.int32)
        chunk = jnp.take_along_axis(TOKENS, jnp.asarray(at), 1) * real
        logits, cache = cached(model, chunk, jnp.asarray(at), real, cache)
        for row, length in enumerate(lengths):
            start = done[row]
            close(logits[row, -length:], expected[row, start : start + length])
        done += lengths


FP8, FP4 = float_format(4, 3), float_format(2, 1)
# name: (format of keys and values, size of a head, whether the kernel reads it)
CACHES = {
    "int4_blocks": (ActivationFormat(4, False, 8), 16, True),
    "int4_wide_block": (ActivationFormat(4, False, 32), 16, True),
    "int4_short_block": (ActivationFormat(4, False, 12), 16, False),
    "int3_short_block": (ActivationFormat(3, block=8), 20, False),
    "int2_half_byte": (ActivationFormat(2, False), 10, False),
    "int1_half_byte": (ActivationFormat(1), 20, False),
    "fp8": (ActivationFormat(8, element=FP8), 8, False),
    "fp4_short_block": (ActivationFormat(4, block=6, element=FP4), 8, False),
}


@pytest.mark.parametrize("name", CACHES)
def test_packed_caches_hold_what_rounding_gives(name):
    """A prompt and single steps equal the full pass, whoever reads the cache."""
    format, dim, direct = CACHES[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, dim)), jnp.float32)
    np.testing.assert_array_equal(format.decode(format.encode(x)), format.round(x))
    layer = Layer(attention(head_dim=dim, window=6), MLP(40))
    model = random_model(make(layer, 1).with_cache(format))
    expected, cache = forward(model), model.config.empty_cache(2, LENGTH)
    assert cache["layers.0"].direct == direct
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        now = (x[:, start:stop] for x in (TOKENS, ROW, jnp.ones_like(ROW)))
        logits, cache = cached(model, *now, cache)
        close(logits, expected[:, start:stop])


def test_a_pass_longer_than_the_cache_is_refused():
    model = random_model(CONFIGS["grouped"])
    with pytest.raises(ValueError, match=r"12 tokens for a cache of 8 slots"):
        model(TOKENS, cache=model.config.empty_cache(2, 8))


def test_packed_documents_equal_separate_ones(model):
    first, second = TOKENS[0, :7], TOKENS[1, :4]
    pad = jnp.zeros(1, TOKENS.dtype)
    packed = jnp.stack([jnp.concatenate((first, second, pad))] * 2)
    segments = jnp.array([[1] * 7 + [2] * 4 + [0]] * 2)
    positions = jnp.array([[*range(7), *range(4), 0]] * 2)
    logits, separate = forward(model, packed, positions, segments), forward(model)
    close(logits[0, :7], separate[0, :7])
    close(logits[1, 7:11], separate[1, :4])


def collected(config: Transformer, params) -> dict[str, int]:
    """Width of the statistics of each tap, by its full path."""
    hidden = config.embed(params, TOKENS, ROW)
    found = {}
    for path, block in config.blocks():
        run = lambda p, h, block=block: block.run(p, h, ROW, None, None, ("gram",))[1]  # noqa: E731
        stats = jax.eval_shape(run, get(params, path), hidden)
        nodes = jax.tree_util.tree_flatten_with_path(
            stats, is_leaf=lambda x: isinstance(x, Stats)
        )[0]
        for keys, node in nodes:
            tap = ".".join([path, *(k.key for k in keys)])
            found[tap] = jax.tree.leaves(node.gram)[0].shape[-1]
    return found | {"final": config.width}


def test_paths_sites_and_axes_fit(model):
    """Every path exists; each tap is collected and as wide as its consumers."""
    config, params = model.config, model.params
    groups, taps = set(paths(params)), collected(config, params)
    for site in config.sites():
        assert site.producer is None or site.producer in groups
        for path in site.consumers:
            assert weights.shape(get(params, path)["weight"])[0] == taps[site.tap]
            assert len(config.axes(path)) == 2
    assert set(config.linears()) <= groups - {config.head_path}
    residual = config.residual()
    assert len(residual.kinds) == len(residual.readers)
    assert len(residual.post_norms) == len(residual.writers)
    read = {path for _, found in residual.readers for path in found}
    inner = {p for p in groups if p.endswith((".down", ".o"))}
    assert inner == set(residual.writers)
    assert read | inner | {"embed"} == {p for p in groups if "weight" in get(params, p)}


def scaled_producer(params, site, s):
    """The producer's output times the consumers' channels ``s`` (through the map)."""
    group = dict(get(params, site.producer))
    heads = s.reshape(-1, site.repeat, site.head_dim)
    own = heads[:, 0].reshape(-1)
    if site.kind == "linear":
        group["weight"] = group["weight"] * own
    else:
        one = float(site.kind == "norm_plus_one")
        group["scale"] = (group["scale"] + one) * own - one
    if "bias" in group:
        group["bias"] = group["bias"] * own
    return put(params, site.producer, group)


def test_site_channels_map_to_their_producer(model):
    """Scaling a producer's channels and its consumers inversely changes nothing."""
    expected, tried = forward(model), 0
    every = dict(model.config.residual().readers)
    for site in model.config.sites():
        if site.producer in (None, "norm"):
            continue
        consumers = site.consumers if site.exclusive else every[site.producer]
        channels = weights.shape(get(model.params, consumers[0])["weight"])[0]
        own = np.random.default_rng(tried).uniform(0.5, 1.5, channels // site.repeat)
        heads = own.astype(np.float32).reshape(-1, 1, site.head_dim)
        s = jnp.asarray(heads.repeat(site.repeat, 1).reshape(-1))
        params = scaled_producer(model.params, site, s)
        unchanged = forward(model.replace(params=params))
        assert float(jnp.abs(unchanged - expected).max()) > 1e-3
        for path in consumers:
            w = get(params, path)["weight"] / s[:, None]
            params = put(params, f"{path}.weight", w)
        close(forward(model.replace(params=params)), expected)
        tried += 1
    assert tried >= 4


def folded(params, residual):
    """Norm scales and biases moved into the weights that read them."""
    for (norm, consumers), kind in zip(residual.readers, residual.kinds, strict=True):
        group = get(params, norm)
        scale = group["scale"] + float(kind == "rms_plus_one")
        for path in consumers:
            reader = dict(get(params, path))
            if "bias" in group:
                extra = group["bias"] @ reader["weight"]
                reader["bias"] = reader.get("bias", 0.0) + extra
            reader["weight"] = scale[:, None] * reader["weight"]
            params = put(params, path, reader)
        blank = {k: 0 * v for k, v in group.items()}
        blank["scale"] += 1.0 - float(kind == "rms_plus_one")
        params = put(params, norm, blank)
    return params


def rotation_around_ones() -> np.ndarray:
    """A random orthogonal matrix that leaves the vector of ones in place."""
    rng = np.random.default_rng(1)
    basis = np.concatenate(
        (np.ones((WIDTH, 1)), rng.normal(size=(WIDTH, WIDTH - 1))), 1
    )
    frame = np.linalg.qr(basis)[0]
    turn = np.eye(WIDTH)
    turn[1:, 1:] = np.linalg.qr(rng.normal(size=(WIDTH - 1, WIDTH - 1)))[0]
    return frame @ turn @ frame.T


@pytest.mark.parametrize("name", ROTATABLE)
def test_residual_rotates(name):
    """x -> x Q for an orthogonal Q that keeps the mean (which layer norms need)."""
    config = dataclasses.replace(CONFIGS[name], tied=False)
    model = random_model(config)
    residual = config.residual()
    assert set(residual.post_norms) == {None}
    q = jnp.asarray(rotation_around_ones(), jnp.float32)
    params = folded(model.params, residual)
    for path in (residual.embed, *(p for _, found in residual.readers for p in found)):
        params = put(params, f"{path}.weight", q.T @ get(params, path)["weight"])
    if residual.positions:
        path = f"{residual.positions}.table"
        params = put(params, path, get(params, path) @ q)
    for path in residual.writers:
        group = {leaf: value @ q for leaf, value in get(params, path).items()}
        params = put(params, path, group)
    close(forward(model.replace(params=params)), forward(model))


def test_post_norms_are_named():
    residual = CONFIGS["sandwich"].residual()
    assert residual.post_norms[:2] == (
        "layers.0.attn_post_norm",
        "layers.0.mlp_post_norm",
    )
    assert set(residual.kinds) == {"rms_plus_one"}


def test_rotation_depends_on_distance_only():
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)))
    q, k = (jnp.broadcast_to(x, (1, 3, 1, 8)) for x in (q, k))
    here, there = jnp.array([[9, 25, 9]]), jnp.array([[4, 20, 3]])
    for rope in (Rope(), Rope(interleaved=True), Rope(fraction=0.5)):
        product = (rotate(q, here, rope) * rotate(k, there, rope)).sum((0, 2, 3))
        assert float(product[0]) == pytest.approx(float(product[1]), rel=1e-4)
        assert float(product[0]) != pytest.approx(float(product[2]), rel=1e-3)


def test_longrope_goes_by_the_length_of_each_document():
    """Seven tokens take the long factors, four the short ones; padding counts not."""
    factors = dict(short=(1.0, 1.1, 1.2, 1.3), long=(1.5, 4.0, 9.0, 16.0))
    scaling = RopeScaling("longrope", original_length=6, **factors)
    rope = Rope(scaling=scaling)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 1, 8)), jnp.float32)
    positions = jnp.array([[*range(7), *range(4), 9]])
    packed = rotate(x, positions, rope, jnp.array([[1] * 7 + [2] * 4 + [0]]))
    for kind, at, alone in (("long", 0, 7), ("short", 7, 4)):
        part, there = x[:, at : at + alone], jnp.arange(alone)[None]
        found = packed[:, at : at + alone]
        close(found, rotate(part, there, rope))
        one = dataclasses.replace(scaling, short=factors[kind], long=factors[kind])
        close(found, rotate(part, there, Rope(scaling=one)))


def test_rotary_halves_keep_the_function():
    config = CONFIGS["interleaved"]
    layer = config.layers[0]
    normed = dataclasses.replace(layer.attention, qk_norm=Norm())
    layers = (dataclasses.replace(layer, attention=normed), layer)
    model = random_model(dataclasses.replace(config, layers=layers))
    halves = rotary_halves(model)
    assert not any(x.attention.rope.interleaved for x in halves.config.layers)
    close(forward(halves), forward(model))


def test_rounded_probabilities_are_powers_of_two():
    """Probabilities against one-hot values: -log2 p rounded, and nothing below."""
    rng = np.random.default_rng(5)
    q, k = (jnp.asarray(8 * rng.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in "qk")
    v = jnp.broadcast_to(jnp.eye(6)[None, :, None], (1, 6, 2, 6))
    mask = jnp.tril(jnp.ones((1, 6, 6), bool))
    exact = np.asarray(attend(q, k, v, mask, scale=0.5), np.float64)
    found = np.asarray(attend(q, k, v, mask, scale=0.5, format=Log2(3)))
    with np.errstate(divide="ignore"):
        power = np.round(-np.log2(exact))
    assert (power[exact > 0] > 7).any()  # some of them are too small
    np.testing.assert_array_equal(found, np.where(power > 7, 0.0, 2.0**-power))
    slope = jax.grad(lambda p: Log2(3).round(p).sum())(jnp.array([0.0, 0.01, 0.3]))
    assert slope.tolist() == [1, 1, 1]


def test_learned_positions_end():
    model = random_model(CONFIGS["learned"])
    with pytest.raises(ValueError, match=r"65 tokens.* 64 positions"):
        model(jnp.zeros((1, 65), jnp.int32))


def test_stories_text_is_golden(stories, stories_tokenizer, shared_data):
    """Greedy decoding from BOS gives the published text, character by character."""
    notes = (shared_data / "models/stories260K/stories260K.md").read_text()
    golden = re.search(r"-t 0\.0\n(.*?)\n```", notes, re.DOTALL)[1]
    cache, ids = stories.config.empty_cache(1, 256), [stories_tokenizer.bos_id]
    for i in range(256):
        now = (jnp.array([[x]], jnp.int32) for x in (ids[-1], i, 1))
        logits, cache = cached(stories, *now, cache)
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == stories_tokenizer.bos_id:
            break
    assert stories_tokenizer.decode(ids) == golden
