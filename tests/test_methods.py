"""Every method by discovery: its contract, and the laws of its family."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.batch import Batch
from jaxllm.core.compose import Transform, compose, plan, where
from jaxllm.core.model import weight
from jaxllm.core.spec import call, decode, encode, walk_expressions
from jaxllm.models import MLP, Attention, Layer, MoE, Transformer, init

NAMES = sorted(methods.entries())
GROUPED = {"group_size": 16}
EXAMPLES = {
    "mixed_precision": {"bits": 5.0},
    "evopress": {"bits": 5.0, "generations": 2, "offspring": 2},
    "aqlm": {"length": 4, "bits": 4, "rounds": 1},
    "ziplm": {"levels": 3},
    "smoothquant": {"bits": 8},
    "smoothquant_plus": {"steps": 2},
    "slim_llm": {"share": 0.5},
    "bitstack": {"rank": 1},
    "gptvq": {"bits": 4},
    "vptq": {"bits": 4},
    "zeroquant_fp": {"rank": 2},
    "int2_1": {"rank": 2},
    "shiftaddllm": {"steps": 4},
    "abq_llm": {"epochs": 1},
    "mobilequant": {"epochs": 1},
    "omniquant": {"epochs": 1},
    "affinequant": {"epochs": 1},
    "flatquant": {"epochs": 1, "kv_bits": None},
    "pst": {"epochs": 1},
    "spinquant": {"steps": 2},
}
BODY = {"quantize", "prune", "factorize"}
# Structured methods change shapes, by the data: tests/test_structure.py has their laws.
SAME_SHAPE = [n for n in NAMES if methods.entries()[n].family != "structure"]


def marks(name: str, mark: str) -> bool:
    """Whether a body inside the method says so of itself: ``whole``, ``adaptive``."""
    parts = walk_expressions(example(name))
    return any(getattr(part.call, mark, False) for part in parts)


def tiny(groups: int = 2, **changes) -> Transformer:
    """Two layers; as many ``groups`` of keys as heads make all maps of one shape."""
    layer = Layer(Attention(4, groups, 8), MLP(32))
    return Transformer(vocab_size=64, width=32, layers=(layer,) * 2, **changes)


@pytest.fixture(scope="module")
def model():
    """Of float32, with values that bfloat16 has too: lossless methods ask for them.

    One shape, so that a method compiles its search once; grouped heads meet every
    method in tests/test_strict.py.
    """
    made = init(tiny(groups=4, init_std=0.2), jax.random.key(0))
    exact = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)  # noqa: E731
    return made.replace(params=jax.tree.map(exact, made.params))


@pytest.fixture(scope="module")
def batches():
    tokens = jax.random.randint(jax.random.key(1), (2, 4, 24), 0, 64)
    return [Batch(t) for t in tokens]


def example(name: str) -> Transform:
    """The method with its defaults, in groups that the tiny model has."""
    make = methods.find(name)
    defaults = dict(make().arguments)
    groups = {k: v for k, v in GROUPED.items() if k in defaults}
    return make(**groups, **EXAMPLES.get(name, {}))


def slow(*names: str):
    """Methods whose kind another one stands for in what is not slow."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


# What an adaptive method stores depends on the data: shapes alone do not tell it.
FIXED = [n for n in SAME_SHAPE if not marks(n, "adaptive")]


@pytest.fixture(scope="module")
def made(model, batches):
    """Each method's result on the tiny model, once."""
    found = {}

    def get(name: str):
        if name not in found:
            found[name] = example(name)(model, batches)
        return found[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_card_and_place(name):
    entry = methods.entries()[name]
    assert entry.name == name and entry.card.title and entry.card.paper
    assert entry.card.composes, "say what may come before and after"
    assert entry.module.__doc__ and entry.make.__doc__
    for claim in entry.card.claims:
        assert isinstance(methods.parse(claim.spec), Transform)
        assert isinstance(methods.parse(claim.over), Transform)


@pytest.mark.parametrize("name", NAMES)
def test_prints_as_its_spec_and_travels_as_json(name):
    step = example(name)
    assert methods.parse(repr(step)) == step
    data = json.loads(json.dumps(encode(step)))
    assert decode(data, methods.find) == step
    assert hash(decode(data, methods.find)) == hash(step)


@pytest.mark.parametrize("name", NAMES)
def test_is_pure_and_writes_history(name, model, batches, made):
    before = jax.tree.map(np.asarray, model.params)
    result = made(name)
    assert result.history.specs == (example(name),)
    jax.tree.map(np.testing.assert_array_equal, before, model.params)
    assert bool(jnp.isfinite(result(batches[0].tokens)).all())


def learned(name: str) -> bool:
    """Whether blocks are learned: jit compiles every step of it, for a minute."""
    return "inputs" in example(name).needs


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * learned(n)) for n in FIXED],
)
def test_jit_equals_eager(name, model, batches, made):
    step, path = example(name), "layers.0.mlp.down"
    if not marks(name, "whole"):  # a block's weights are learned together
        step = where("layers.0" if learned(name) else path, step)
    jitted = jax.jit(lambda p: step(model.replace(params=p), batches).params)
    again = made(name).replace(params=jitted(model.params))
    expected = weights.materialize(weight(made(name), path))
    found = weights.materialize(weight(again, path))
    wrong = jnp.abs(found - expected) > 1e-3 * jnp.abs(expected).max()
    assert wrong.mean() < 0.01  # ties of rounding may fall either way


@pytest.mark.parametrize("name", FIXED)
def test_plan_has_the_shapes_of_the_result(name, model, batches, made):
    planned = plan(example(name), model, batches)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), made(name).params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned.params) == shapes


@pytest.mark.parametrize(
    "name", [n for n in NAMES if methods.entries()[n].family in BODY]
)
def test_compresses_every_linear(name, model, made):
    result = made(name)
    for path in model.config.linears():
        small, big = weight(result, path), weight(model, path)
        if marks(name, "adaptive") and not weights.compressed(small):
            np.testing.assert_array_equal(small, big)  # left as it is
            continue
        assert weights.compressed(small), path
        assert weights.nbytes(small) < weights.nbytes(big), path


# One budget for the whole selection: a layer's share depends on the others.
@pytest.mark.parametrize("name", [n for n in SAME_SHAPE if not marks(n, "joint")])
def test_does_not_depend_on_the_subset(name, model, batches, made):
    """Layer keys and statistics of layer 0 are those of the whole model."""
    step = example(name)
    try:
        part = where("layers.0", step)(model, batches)
    except ValueError as error:
        assert "cannot be narrowed" in str(error)
        return
    path = "layers.0.mlp.up"
    np.testing.assert_allclose(
        weights.materialize(weight(part, path)),
        weights.materialize(weight(made(name), path)),
        atol=1e-5,
    )
    assert part.params["layers"]["1"] is model.params["layers"]["1"]


@pytest.mark.parametrize(
    "spec",
    (
        "smoothquant(0.5)",
        "smoothquant(0.8, sites='all')",
        "quarot(bits=None, activation_bits=None, kv_bits=None)",
        "lora(4)",
        "pissa(4)",
    ),
)
def test_equivalences_keep_the_logits(spec, batches):
    model = init(tiny(init_std=0.2), jax.random.key(0))
    tokens = batches[0].tokens
    before, after = model(tokens), methods.parse(spec)(model, batches)(tokens)
    assert jnp.abs(after - before).max() < 1e-5 * jnp.abs(before).max() * 4


@pytest.mark.parametrize("name", ("gptq", "smoothquant", *slow("rtn", "wanda", "awq")))
def test_serves_mixtures_of_experts(name, batches):
    layer = Layer(Attention(4, 2, 8), MoE(4, 2, 24, shared=MLP(16)))
    model = init(Transformer(64, 32, (layer,), init_std=0.2), jax.random.key(2))
    result = example(name)(model, batches)
    before, after = model(batches[0].tokens), result(batches[0].tokens)
    assert weights.compressed(weight(result, "layers.0.moe.experts.down"))
    assert not weights.compressed(weight(result, "layers.0.moe.router"))
    assert 0 < jnp.abs(before - after).mean() < jnp.abs(before).mean()


def test_pruning_then_rounding_keeps_the_zeros_and_mends(model, batches):
    step = methods.parse(
        'compose(sparsegpt("2:4"), gptq(4, group_size=16, correct=low_rank(4)))'
    )
    result = step(model, batches)
    w = weight(result, "layers.0.mlp.down")
    sparse, term = w.terms
    support = sparse.support.reshape(-1, 4, 32)
    assert (support.sum(1) == 2).all()
    assert not jnp.where(sparse.support, 0, sparse.materialize()).any()
    assert term.rank == 4 and len(result.history.specs) == 2


def test_the_principal_part_is_kept_from_rounding(model):
    """PiSSA, then NF4: the rest is rounded, whose error is less than the whole's."""
    halved = methods.parse("compose(pissa(8), nf4(group_size=16))")(model)
    whole = methods.parse("compose(nf4(group_size=16), lora(8))")(model)
    for path in model.config.linears():
        w, (rest, kept) = weight(model, path), weight(halved, path).terms
        assert isinstance(rest, weights.Quantized) and kept.inner.rank == 8
        u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
        best = (u[:, :8] * s[:8]) @ vt[:8]
        assert jnp.abs(kept.materialize() - best).max() < 1e-4 * s[0]
        parts = weight(halved, path), weight(whole, path)
        near, far = (jnp.linalg.norm(p.materialize() - w) for p in parts)
        assert near < far


@pytest.mark.parametrize(
    "text, needle",
    (
        ("compose(rtn(4), gptq(4))", "Quantized has no dense part"),
        ("compose(rtn(4), smoothquant())", "rescale"),
        ("compose(rtn(4), quarot())", "rotate before"),
        ('compose(wanda("2:4"), svd(0.5))', "sparse support"),
        ('wanda("3:7")', "do not divide"),
        ("svd(None, 99)", "rank 99"),
    ),
)
def test_what_does_not_fit_is_refused_before_compute(text, needle, model, batches):
    with pytest.raises((TypeError, ValueError), match=needle):
        methods.parse(text)(model, batches)


@pytest.mark.parametrize(
    "text, needle",
    (
        ("gptq(bits=9)", "accepted: 1 to 8"),
        ("gptq(bit=4)", "accepts: bits"),
        ("gptg(bits=4)", "nearest: gptq"),
        ('wanda("4:2")', "accepted"),
        ("wanda(1.5)", "accepted"),
        ("rtn(format='int77')", "number format|accepted"),
        ("magnitude(0.5, scope='head')", "accepted"),
        ("smoothquant(2)", "alpha"),
        ("lora(0)", "rank"),
        ("__import__('os')", "nearest"),
    ),
)
def test_wrong_arguments_are_refused_by_name(text, needle):
    with pytest.raises((TypeError, ValueError), match=needle):
        methods.parse(text)


def test_missing_calibration_is_an_error(model):
    with pytest.raises(ValueError, match=r"gptq\(\) needs calibration data \(gram\)"):
        methods.parse("gptq()")(model)


def test_a_pattern_that_matches_nothing_lists_the_nearest(model):
    with pytest.raises(ValueError, match=r"nearest: layers\.0\.attn"):
        where("layers.0.atn", methods.parse("rtn(4)"))(model)


def test_where_narrows_and_nests(model):
    step = where("layers.*.mlp", where("layers.1", methods.parse("rtn(4, 16)")))
    result = step(model)
    changed = [
        p for p in model.config.linears() if weights.compressed(weight(result, p))
    ]
    assert changed == [f"layers.1.mlp.{n}" for n in ("gate", "up", "down")]
    assert result.history.specs == (step,)
    assert methods.parse(repr(step)) == step


def test_heads_are_left_alone_unless_named(model, batches):
    step = methods.parse("gptq(4, group_size=16)")
    assert not weights.compressed(weight(step(model, batches), "head"))
    named = where("head", step)(model, batches)
    assert weights.compressed(weight(named, "head"))
    assert not weights.compressed(weight(named, "layers.0.attn.q"))


def test_a_tied_embedding_is_one_leaf_when_quantized(batches):
    model = init(tiny(tied=True, init_std=0.2), jax.random.key(3))
    small = where("embed", methods.parse("rtn(8, None)"))(model)
    before, after = model(batches[0].tokens), small(batches[0].tokens)
    assert "head" not in small.params
    assert jnp.abs(before - after).max() < 0.05 * jnp.abs(before).max()


def test_the_walk_resumes_after_any_block(model, batches):
    """Each resume point is enough: what was saved is not computed again."""
    from jaxllm.core.walk import Monitor

    class Memory(dict):
        load, save = dict.get, dict.__setitem__

    step, store = methods.parse("gptq(3, group_size=16)"), Memory()
    whole = step(model, batches, monitor=Monitor(False, store))
    assert list(store) == ["layers.0", "layers.1"]
    first = Memory({"layers.0": store["layers.0"]})
    monitor = Monitor(False, first)
    again = step(model, batches, monitor=monitor)
    assert again.params["layers"]["0"] is store["layers.0"]
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_compile_time_does_not_grow_with_equal_blocks(batches):
    """Four equal blocks compile exactly the programs that two do."""
    from jax._src import test_util

    step = methods.parse("gptq(3, group_size=8)")
    layer = Layer(Attention(4, 2, 8), MLP(24))

    def compilations(depth: int) -> int:
        jax.clear_caches()
        config = Transformer(64, 32, (layer,) * depth)
        model = init(config, jax.random.key(0))
        jax.block_until_ready(model.params)
        with test_util.count_jit_compilation_cache_miss() as count:
            step(model, batches)
        return count()

    assert compilations(4) == compilations(2)


@pytest.mark.parametrize("name", ("gptq", "svd_llm", *slow("rtn", "wanda")))
def test_sharded_equals_unsharded(name, model, batches, made):
    """Forward pass and walk on a mesh of 8 devices with tensor = 2."""
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxllm.distributed import make_mesh, place

    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = make_mesh(data=4, tensor=2)
    split = place(model, mesh)
    q = weight(split, "layers.0.attn.q")
    assert q.sharding.spec == PartitionSpec(None, "tensor")
    data = NamedSharding(mesh, PartitionSpec("data"))
    spread = [Batch(jax.device_put(b.tokens, data)) for b in batches]
    tokens = spread[0].tokens
    np.testing.assert_allclose(split(tokens), model(batches[0].tokens), atol=2e-5)
    result = example(name)(split, spread)
    expected = made(name)(batches[0].tokens)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(result(tokens), expected, atol=2e-3 * scale)
    placed = place(made(name), mesh)
    np.testing.assert_allclose(placed(tokens), expected, atol=1e-4 * scale)


def test_call_takes_variadic_members():
    steps = (methods.parse("rtn(4)"), methods.parse("rtn(3)"))
    assert call(compose, {"transforms": steps}) == compose(*steps)
