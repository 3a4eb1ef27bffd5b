"""Weight types run on their kernels: values, no dense array, no fall back."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxllm
import pallas_kernels
from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.batch import Batch
from jaxllm.core.codebooks import Centroids, DigitPlanes
from jaxllm.core.compose import plan
from jaxllm.core.formats import (
    ActivationFormat,
    Integer,
    extended_float,
    float_format,
    normal_float,
)
from jaxllm.core.metrics import identity
from jaxllm.core.patterns import Pattern
from jaxllm.core.scales import Grid, best_table
from jaxllm.core.solvers import nearest
from jaxllm.core.stacks import signed_stack
from jaxllm.core.weights import (
    ActivationQuantized,
    Gated,
    LowRank,
    Segmented,
    Sparse,
    Sum,
    Trainable,
)
from jaxllm.distributed import make_mesh, place
from jaxllm.evaluate.efficiency import missing_kernels
from jaxllm.models import MLP, Attention, Layer, Transformer, init

IN, OUT = 256, 64


def dense(seed: int = 0, shape=(IN, OUT)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(format, block=64, **more):
    return nearest(Grid(format, block, **more))(dense(), None)


def pruned(pattern=None):
    return nearest(pattern or Pattern(0.5, 4))(dense(), None)


def packed_on_zeros(symmetric=False):
    grid = nearest(Grid(Integer(4, symmetric), 64))
    solve = lambda w, stats, support: grid(w, stats, None, support)  # noqa: E731
    return pruned().refine(solve, None)


def planes(*given, **options):
    return nearest(DigitPlanes(*given, steps=2, **options))(dense(), None)


def gated():
    """Inputs of three blocks out of eight matter so much that others never pass."""
    w = dense(shape=(1024, OUT))
    matters = jnp.arange(1024) // 128 % 3 == 0
    return Gated(w, jnp.where(matters, 1.0, 1e-6), kept=200)


def term(gain: float = 1.0, rank: int = 6):
    factors = dense(6, (IN, rank)) * IN**-0.5, dense(7, (rank, OUT))
    return LowRank(*(a.astype(jnp.bfloat16) for a in factors), gain)


def corrected(*others):
    """The sum of these and of a term of low rank."""
    return Sum((*others, term()))


def entries(count: int = 900):
    """The largest entries, in segments."""
    w = dense(8)
    least = jnp.sort(jnp.abs(w).ravel())[-count]
    return Segmented.of(w, jnp.abs(w) >= least, count)


TYPES = {
    "2:4": pruned,
    "4:8": lambda: nearest(Pattern(0.5, 8))(dense(shape=(512, OUT)), None),
    "2:4 int4": packed_on_zeros,
    "2:4 sint4": lambda: packed_on_zeros(symmetric=True),
    "codebook": lambda: nearest(Centroids(4, steps=2))(dense(), None),
    "codebooks": lambda: nearest(Centroids(4, 64, steps=2))(dense(), None),
    "nf4": lambda: rounded(normal_float(4)),
    "e2m1": lambda: rounded(float_format(2, 1)),
    "choice": lambda: rounded(extended_float(4), rule=best_table()),
    "signs": lambda: planes(2, block=64, shift=True),
    "bits": lambda: planes(2, (0.0, 1.0), 64),
    "trits": lambda: planes(2, (-1.0, 0.0, 1.0), 64),
    "signed stack": lambda: signed_stack(2, 4, identity())(dense(), None),
    "gated": gated,
    "a8 2:4": lambda: ActivationQuantized(pruned(), ActivationFormat(8)),
    "sum": lambda: Sum((rounded(Integer(4)), pruned())),
    "corrected": lambda: corrected(rounded(Integer(4))),
    "corrected nf4 and 2:4": lambda: corrected(rounded(normal_float(4)), pruned()),
    "corrected 2:4": lambda: corrected(pruned()),
    "corrected 2:4 int4": lambda: corrected(packed_on_zeros()),
    "adapted": lambda: Sum((rounded(Integer(4)), Trainable(term(gain=0.5)))),
    "outliers": lambda: Sum((rounded(Integer(4)), entries())),
    "corrected codebook": lambda: corrected(
        nearest(Centroids(4, steps=2))(dense(), None)
    ),
}


@pytest.fixture(params=TYPES, scope="module")
def weight(request):
    return TYPES[request.param]()


def test_the_kernel_gives_the_dense_product(weight):
    x = dense(1, (3, weights.shape(weight)[0]))
    with pallas_kernels.backend("tpu", interpret=True):
        got = jax.jit(lambda w, x: weights.dot(x, w))(weight, x)
    with pallas_kernels.backend("reference"):
        passed = weight.before(x) if isinstance(weight, Gated) else x
        if isinstance(weight, ActivationQuantized):
            passed = weight.format.round(x)
    want = passed @ weight.materialize()
    assert jnp.linalg.norm(got - want) <= 2e-3 * jnp.linalg.norm(want)


KERNELS = ("pallas_call", "mpmd_map")  # of TPUs, of Mosaic GPU
# Hopper has no kernel for these: blocks of 64 signs are 8 bytes.
MISSING = {"tpu": (), "gpu": ("signs", "bits")}


@pytest.fixture(params=MISSING)
def platform(request):
    return request.param


def outside_kernels(jaxpr):
    """All equations but those inside kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in KERNELS:
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from outside_kernels(inner)


def test_no_dense_weight_is_made(weight, platform, request):
    if request.node.callspec.params["weight"] in MISSING[platform]:
        pytest.skip(f"no kernel for {platform}, as test_what_falls_back sees")
    x = dense(1, (3, weights.shape(weight)[0]))
    with pallas_kernels.backend(platform):
        jaxpr = jax.make_jaxpr(lambda w, x: weights.dot(x, w))(weight, x)
    equations = list(outside_kernels(jaxpr.jaxpr))
    assert any(e.primitive.name in KERNELS for e in equations)
    limit = weights.size(weight)
    for equation in equations:
        for made in equation.outvars:
            size = np.prod(made.aval.shape)
            assert size < limit, f"{equation.primitive} makes {made.aval}"


def test_what_falls_back(weight, platform, request):
    x = dense(1, (3, weights.shape(weight)[0]))
    with pallas_kernels.survey(platform) as found:
        jax.eval_shape(lambda w, x: weights.dot(x, w), weight, x)
    name = request.node.callspec.params["weight"]
    assert bool(found.missing) == (name in MISSING[platform]), found.missing


@pytest.mark.parametrize("name", ("corrected", "corrected 2:4 int4", "adapted"))
def test_a_term_of_low_rank_is_added_by_the_kernel(name, platform):
    """Outside it nothing is left but the narrow product x L."""
    w, x = TYPES[name](), dense(1, (4, IN)).astype(jnp.bfloat16)
    with pallas_kernels.backend(platform):
        jaxpr = jax.make_jaxpr(lambda w, x: weights.dot(x, w))(w, x)
    equations = list(outside_kernels(jaxpr.jaxpr))
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.shape for e in products] == [(4, 6)]
    sums = [e.outvars[0].aval for e in equations if e.primitive.name == "add"]
    assert all(made.shape != (4, OUT) for made in sums)


LAYER = Layer(Attention(4, 4, 64), MLP(512))
METHODS = {
    "magnitude": {"sparsity": "2:4"},
    "bcq": {"group_size": 64},
    "ptqtp": {"group_size": 64},
    "squeezellm": {"outliers": 0.0},
    "bitmod": {"bits": 4, "group_size": 64},
    "wina": {},
}


ON_HOPPER = ("magnitude", "ptqtp", "squeezellm", "bitmod")


@pytest.mark.parametrize(
    "platform, name",
    [*(("tpu", name) for name in METHODS), *(("gpu", name) for name in ON_HOPPER)],
)
def test_models_of_methods_have_their_kernels(platform, name):
    """Traced by shape: no weight of the model is expanded."""
    config = Transformer(256, 256, (LAYER,))
    model = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    batches = [Batch(jnp.zeros((1, 64), jnp.int32))]
    made = plan(methods.find(name)(**METHODS[name]), model, batches)
    missing = missing_kernels(made, platform)
    if platform == "gpu":  # its kernel wants a cache of 16 bits
        missing.pop("decode_attention")
    assert not missing


def test_a_narrowed_mask_still_has_whole_groups():
    """Groups that lose entries keep explicit zeros, which stay outside the support."""
    sparse = pruned()
    narrow = jax.random.bernoulli(jax.random.key(5), 0.6, (IN, OUT))
    made = sparse.refine(
        lambda w, stats, support: jnp.where(support, w, 0), None, narrow
    )
    assert isinstance(made, Sparse)
    counts = np.unpackbits(np.asarray(made.mask), axis=1).reshape(OUT, -1, 4).sum(-1)
    assert (counts == 2).all()
    np.testing.assert_array_equal(made.support, sparse.support & narrow)
    np.testing.assert_array_equal(
        made.materialize(), jnp.where(narrow & sparse.support, dense(), 0)
    )
    x = dense(2, (2, IN))
    with jaxllm.backend("tpu", interpret=True):
        np.testing.assert_allclose(made.dot(x), x @ made.materialize(), atol=1e-4)


def test_what_has_no_kernel_says_why():
    x = dense(1, (3, IN))
    cases = (
        (nearest(Pattern(0.5))(dense(), None), "pattern 'row' are not in groups"),
        (planes(1, (-1.0, 0.5, 1.0)), "not evenly spaced"),
    )
    for w, reason in cases:
        with (
            jaxllm.backend("tpu"),
            pytest.raises(NotImplementedError, match=reason),
        ):
            w.dot(x)


def test_a_packed_model_on_a_mesh_is_the_model():
    """Column- and row-parallel weights and heads on their devices: no weight moves."""
    config = Transformer(256, 256, (LAYER,))
    model = init(config, jax.random.key(0))
    model = methods.find("rtn")(bits=4, group_size=64)(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 256)
    expected = model(tokens)
    mesh = make_mesh(data=2, tensor=4)
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    args = place(model, mesh), jax.device_put(tokens, rows)
    with jaxllm.backend("tpu", interpret=True):
        run = jax.jit(lambda model, tokens: model(tokens)).lower(*args).compile()
    error = jnp.linalg.norm(run(*args) - expected) / jnp.linalg.norm(expected)
    assert error < 2e-3
    moved = re.findall(r"= u8\S+ all-gather", run.as_text())
    assert not moved
