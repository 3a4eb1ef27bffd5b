"""No hidden promotion: dtypes and ranks meet only where the code says how.

Everything is traced by shape, nothing is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from test_weights import ROWS, TYPES

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.batch import Batch
from jaxllm.core.compose import plan
from jaxllm.core.formats import ActivationFormat
from jaxllm.models import MLP, Attention, Layer, MoE, Norm, Policy, Transformer, init

DTYPES = ("float32", "bfloat16")
# Each kind of model in one dtype; the others are slow tests.
USUAL = (("llama", "bfloat16"), ("moe", "float32"), ("gpt", "bfloat16"))
GROUPS = {"group_size": 16}
BUDGETS = {name: {"bits": 5.0} for name in ("mixed_precision", "evopress")}
LLAMA = (Layer(Attention(4, 2, 8), MLP(32)),) * 2
EXPERTS = MoE(4, 2, 24, shared=MLP(16), shared_gate=True)
MOE = (Layer(Attention(4, 2, 8, qk_norm=Norm(), bias=True), EXPERTS),) * 2
GPT_ATTENTION = Attention(
    4, 4, 8, rope=None, bias=True, out_bias=True, softcap=5.0, window=4
)
GPT_MLP = MLP(32, "gelu_tanh", gated=False, bias=True)
GPT = (Layer(GPT_ATTENTION, GPT_MLP, Norm("layer"), parallel=True),) * 2
MODELS = {
    "llama": lambda policy: Transformer(64, 32, LLAMA, policy=policy),
    "moe": lambda policy: Transformer(64, 32, MOE, tied=True, policy=policy),
    "gpt": lambda policy: Transformer(
        64,
        32,
        GPT,
        norm=Norm("layer"),
        positions=32,
        embed_scale=2.0,
        logit_softcap=3.0,
        policy=policy,
    ),
}
PASSES = {
    "plain": {},
    "scan": {"scan": True},
    "remat": {"remat": True},
    "hidden": {"hidden_only": True},
}
# What a method says of a model that it does not fit.
REFUSED = {
    ("gpt", "quarot"): "only RMS norms",
    ("gpt", "slicegpt"): "only RMS norms",
    ("gpt", "spinquant"): "only RMS norms",
    ("moe", "dfloat11"): "takes dense matrices only",
    ("moe", "abq_llm"): "expert weights are not reconstructed",
    ("moe", "mobilequant"): "expert weights are not reconstructed",
    ("moe", "omniquant"): "expert weights are not reconstructed",
    ("moe", "affinequant"): "expert weights are not reconstructed",
    ("moe", "flatquant"): "expert weights are not reconstructed",
    ("moe", "pst"): "expert weights are not reconstructed",
}
TOKENS = jax.ShapeDtypeStruct((4, 24), jnp.int32)


@pytest.fixture(autouse=True)
def strict():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


@pytest.fixture(params=MODELS, scope="module")
def kind(request):
    return request.param


@pytest.fixture(params=DTYPES, scope="module")
def dtype(request):
    return request.param


def pairs():
    """Models and dtypes; every method meets all of either in what is not slow."""
    for kind in MODELS:
        for dtype in DTYPES:
            marks = pytest.mark.slow if (kind, dtype) not in USUAL else ()
            yield pytest.param(kind, dtype, marks=marks)


def shapes(kind: str, dtype: str):
    """A model without memory."""
    config = MODELS[kind](Policy(dtype, dtype))
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


@pytest.mark.parametrize("way", PASSES)
def test_forward(kind, dtype, way):
    model = shapes(kind, dtype)
    run = lambda p, t: model.config.forward(p, t, **PASSES[way])  # noqa: E731
    out = jax.eval_shape(run, model.params, TOKENS)
    assert out.shape[:2] == TOKENS.shape
    assert out.dtype == (dtype if way == "hidden" else jnp.float32)


def test_packed_documents(kind, dtype):
    model = shapes(kind, dtype)
    run = lambda p, t: model.config.forward(p, t, segments=t, positions=t)  # noqa: E731
    assert jax.eval_shape(run, model.params, TOKENS).shape == (4, 24, 64)


@pytest.mark.parametrize("bits", (None, 4))
@pytest.mark.parametrize("scan", (False, True))
def test_cache(kind, dtype, bits, scan):
    model = shapes(kind, dtype)
    format = None if bits is None else ActivationFormat(bits, symmetric=False)
    config = model.config.with_cache(format, rotate_qk=bits is not None)

    def run(params, tokens):
        cache = config.empty_cache(4, 32)
        return cache, config.forward(params, tokens, cache=cache, scan=scan)

    before, (logits, after) = jax.eval_shape(run, model.params, TOKENS)
    assert logits.dtype == jnp.float32 and before == after


@pytest.mark.parametrize("name", sorted(methods.entries()))
@pytest.mark.parametrize("kind, dtype", list(pairs()))
def test_methods_and_their_models(kind, dtype, name):
    """The transform's shapes, then a pass of the model that it makes."""
    make, model = methods.find(name), shapes(kind, dtype)
    defaults = dict(make().arguments)
    groups = {k: v for k, v in GROUPS.items() if k in defaults}
    step = make(**groups, **BUDGETS.get(name, {}))
    batches = [Batch(jnp.zeros(TOKENS.shape, jnp.int32))]
    if (kind, name) in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[kind, name]):
            plan(step, model, batches)
        return
    out = plan(step, model, batches)
    run = lambda p, t: out.config.forward(p, t)  # noqa: E731
    assert jax.eval_shape(run, out.params, TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("name", TYPES)
def test_weight_types(name, dtype):
    # A Huffman code is made on the host, from values.
    w = TYPES[name]() if name == "entropy coded" else jax.eval_shape(TYPES[name])
    x = jax.ShapeDtypeStruct((2, 5, ROWS), jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    dense = jax.eval_shape(weights.materialize, w)
    assert dense.dtype == w.dtype
    assert jax.eval_shape(lambda w, x: weights.dot(x, w), w, x).dtype == dtype
    assert jax.eval_shape(weights.rows, w, ids).shape == (2, 3, ROWS)
