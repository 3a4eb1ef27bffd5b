"""Equivalences of sites: folds are exact, and what is learned never ends up worse."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import reconstruct, rescale
from jaxllm.core.affine import _dominant, _matrix, affine, kronecker, scaling
from jaxllm.core.batch import Batch
from jaxllm.core.compose import transform
from jaxllm.core.equivalences import fold, pooled, shiftable
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.learned import Recipe, fixed_range, learned_range, softened
from jaxllm.core.migration import migrate
from jaxllm.core.model import get, put
from jaxllm.core.reconstruct import clipping, target
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest
from jaxllm.core.spin import learned_rotation
from jaxllm.core.stiefel import cayley, cayley_step
from jaxllm.core.walk import Monitor, Seen, inputs_of, walk
from jaxllm.core.weights import ActivationQuantized
from jaxllm.models import MLP, Attention, Layer, Norm, Transformer, init

LLAMA = Layer(Attention(4, 2, 8), MLP(32))
GPT = Layer(
    Attention(4, 4, 8, rope=None, bias=True, out_bias=True),
    MLP(32, "gelu_tanh", gated=False, bias=True),
    Norm("layer"),
)
GEMMA = Layer(Attention(4, 1, 8), MLP(32), Norm(plus_one=True))
LAYERS = {"llama": LLAMA, "gpt": GPT, "gemma": GEMMA}


def build(kind: str, depth: int = 2):
    """A model in which no parameter is zero or one."""
    layer = LAYERS[kind]
    config = Transformer(64, 32, (layer,) * depth, norm=layer.norm, init_std=0.2)
    made = init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(made.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.1 * jax.random.normal(k, x.shape) if x.ndim == 1 else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return made.replace(params=jax.tree.unflatten(tree, noisy))


@pytest.fixture(params=LAYERS, scope="module")
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def batches():
    tokens = jax.random.randint(jax.random.key(2), (2, 4, 24), 0, 64)
    return [Batch(t) for t in tokens]


def same_function(before, after, tokens) -> None:
    expected, found = before(tokens), after(tokens)
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * largest)


def per_channel(site, width: int, low: float, high: float, seed: int):
    """Random values that repeated heads share."""
    key = jax.random.key(seed)
    return pooled(site, jax.random.uniform(key, (width,), minval=low, maxval=high))


def test_shift_and_scale_keep_the_logits(model, batches):
    """At every site at once: norms, values of grouped heads, and hidden channels."""
    params, moved = model.params, 0
    for i, site in enumerate(model.config.sites()):
        width = len(get(params, f"{site.consumers[0]}.weight"))
        factor = per_channel(site, width, 0.2, 5.0, i)
        shift = per_channel(site, width, -2.0, 2.0, i + 99)
        moved += shiftable(site)
        params = fold(params, site, factor, shift if shiftable(site) else None)
    assert moved == 6  # of each layer: two norms and the values
    assert "bias" in params["layers"]["0"]["attn_norm"]
    same_function(model, model.replace(params=params), batches[0].tokens)


@pytest.mark.parametrize("kind", ("llama", "gemma"))
def test_a_rotation_keeps_the_logits(kind, batches):
    """All norms have scales of their own, which must reach the weights behind them."""
    model, tokens = build(kind), batches[0].tokens
    spec = "quarot(bits=None, activation_bits=None, kv_bits=None)"
    after = methods.parse(spec)(model)
    before, found = model(tokens), after(tokens)
    assert jnp.abs(found - before).max() < 5e-5 * jnp.abs(before).max()


def test_a_shift_that_no_producer_takes_is_refused():
    model = build("llama")
    sites = model.config.sites()
    hidden = next(s for s in sites if s.tap.endswith("mlp.hidden"))
    with pytest.raises(ValueError, match="no producer takes a shift"):
        fold(model.params, hidden, jnp.ones(32), jnp.ones(32))


@transform
def migrated(steps: int = 20, shift: bool = True):
    """Outlier Suppression+ without the rounding that follows."""
    solve = nearest(Grid(Integer(4, symmetric=True)))
    return migrate(solve, ActivationFormat(4), steps=steps, shift=shift)


def first_inputs(model, batches):
    """What the first attention reads, [tokens, width]."""
    block, found = model.config.blocks()[0][1], []
    for batch in batches:
        hidden = model.config.embed(model.params, batch.tokens)
        steps = jnp.broadcast_to(jnp.arange(24), (4, 24))
        params = get(model.params, "layers.0")
        taps = inputs_of(block, params, hidden, (steps, None, None))
        found.append(taps["attn.input"].x)
    return jnp.concatenate(found)


def test_migration_centres_and_shrinks_and_keeps_the_logits(model, batches):
    """A channel far from zero comes to the middle; a wide one becomes narrower."""
    path = "layers.0.attn_norm"
    width = model.config.width
    scale = jnp.ones(width).at[3].set(12.0)
    bias = jnp.zeros(width).at[5].set(12.0)
    strong = put(model.params, path, dict(scale=scale, bias=bias))
    strong = model.replace(params=strong)
    after = migrated()(strong, batches)
    same_function(strong, after, batches[0].tokens)
    x, y = (first_inputs(m, batches) for m in (strong, after))
    assert x[:, 5].mean() > 9 and abs(y[:, 5].mean()) < 2
    assert jnp.abs(y[:, 3]).max() < jnp.abs(x[:, 3]).max() / 2
    np.testing.assert_allclose(y.max(0), -y.min(0), rtol=1e-4)
    plain = migrated(shift=False)(strong, batches)
    same_function(strong, plain, batches[0].tokens)
    assert get(plain.params, path)["bias"].argmax() == 5


FAMILIES = {"scaling": scaling(), "affine": affine(), "kronecker": kronecker()}


def recipe_of(model, batches, family):
    """A block's recipe, parameters and perturbed theta, and its inputs."""
    path, block = model.config.blocks()[0]
    symmetric = family == kronecker()  # both kinds of ranges are learned somewhere
    inputs = learned_range if symmetric else fixed_range
    rounding = clipping(3, 16, symmetric=symmetric)
    whole = Recipe(rounding, family, inputs(ActivationFormat(4)))
    recipe = whole.inside(path, model.config.linears(), model.config.sites())
    params = get(model.params, path)
    steps = jnp.broadcast_to(jnp.arange(24), (4, 24))
    items = tuple(
        (model.config.embed(model.params, b.tokens), (steps, None, None))
        for b in batches
    )
    seen = Seen({}, block, items)
    theta = recipe.start(params, seen, path, jax.random.key(4))
    leaves, tree = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [
        x + 0.2 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    theta = jax.tree.unflatten(tree, moved)
    return recipe, params, theta, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_families_keep_the_function_and_render_what_is_soft(
    family, model, batches
):
    """For any theta: no rounding, no change; the stored block is the soft one."""
    recipe, params, theta, seen = recipe_of(model, batches, FAMILIES[family])
    hidden, rest = seen.inputs[0]
    progress = jnp.ones(())

    @functools.partial(jax.jit, static_argnums=0)
    def run(change, theta):
        return target(seen.block, change(theta, params, progress), hidden, rest)

    before = target(seen.block, params, hidden, rest)
    peak = float(jnp.abs(before).max())
    np.testing.assert_allclose(run(recipe.changed, theta), before, atol=2e-5 * peak)
    soft, stored = run(recipe, theta), run(recipe.render, theta)
    assert jnp.abs(soft - before).mean() > 1e-2
    apart = jnp.abs(soft - stored)  # a tie of rounding may fall either way
    assert apart.mean() < 1e-3 * jnp.abs(soft).mean()
    slopes = jax.jit(jax.grad(lambda t: (run(recipe, t) ** 2).sum()))(theta)
    found = jax.tree_util.tree_flatten_with_path(slopes)[0]
    still = [p for p, g in found if not jnp.any(g != 0)]
    assert not still, still


def test_kronecker_factors_stay_well_conditioned():
    """Whatever is learned: below e^2, but for the rounding to bfloat16."""
    keys = jax.random.split(jax.random.key(6), 3)
    theta = {
        name: 10 * jax.random.normal(key, shape)
        for name, key, shape in zip(
            ("u", "v", "stretch"), keys, ((8, 8), (8, 8), (8,)), strict=True
        )
    }
    made = np.asarray(_matrix(theta), np.float32)
    assert 3 < np.linalg.cond(made) < 1.05 * np.e**2


def test_descent_stays_orthogonal_and_finds_a_rotation():
    """min |X - Q|^2 over orthogonal X, for a Q that is one."""
    goal = cayley(jax.random.normal(jax.random.key(7), (6, 6)) / 4)
    start = cayley(jax.random.normal(jax.random.key(8), (6, 6)) / 4)
    x = start
    for _ in range(200):
        x = cayley_step(x, 2 * (x - goal), 0.2)
    np.testing.assert_allclose(x @ x.T, np.eye(6), atol=1e-5)
    assert jnp.abs(start - goal).max() > 0.5
    np.testing.assert_allclose(x, goal, atol=1e-4)


@transform
def spun(steps: int = 8, rate: float = 0.5):
    """Learned rotations without the rounding that follows."""
    formats = dict(activations=ActivationFormat(3), cache=ActivationFormat(3))
    return learned_rotation(**formats, steps=steps, rate=rate)


@pytest.mark.parametrize("kind", ("llama", "gemma"))
def test_learned_rotations_keep_the_logits_and_lower_the_loss(kind, batches):
    model, monitor = build(kind), Monitor(progress=False)
    after = spun()(model, batches, monitor=monitor)
    before, found = (m(batches[0].tokens) for m in (model, after))
    assert jnp.abs(found - before).max() < 1e-4 * jnp.abs(before).max()
    (event,) = monitor.events
    assert event["error_after"] < event["error_before"]


def test_affine_maps_stay_well_conditioned():
    """Whatever is learned, and the gradual mask starts from the diagonal."""
    wild = 100 * jax.random.normal(jax.random.key(6), (3, 8, 8))
    full, none = _dominant(wild, 0.5, jnp.ones(())), _dominant(wild, 0.5, jnp.zeros(()))
    assert max(np.linalg.cond(a, np.inf) for a in np.asarray(full)) < 3.0 + 1e-4
    assert (full != 0).all()
    np.testing.assert_array_equal(none, jnp.broadcast_to(jnp.eye(8), none.shape))
    half = _dominant(wild, 0.5, jnp.asarray(0.5))
    assert half[0, 0, 3] != 0 and half[0, 0, 4] == 0


def test_a_block_never_ends_above_its_start(batches):
    """Equal blocks and all epochs share one compiled step."""
    model, spec = build("llama"), "omniquant(3, 16, 4, epochs={}, rates=({}, {}))"

    def errors(*arguments):
        monitor = Monitor(progress=False)
        methods.parse(spec.format(*arguments))(model, batches, monitor=monitor)
        return [(e["error_before"], e["error_after"]) for e in monitor.events]

    before = reconstruct._step._cache_size(), reconstruct._loss._cache_size()
    tame = errors(6, 0.02, 0.05)
    after = reconstruct._step._cache_size(), reconstruct._loss._cache_size()
    assert after == (before[0] + 1, before[1] + 1)
    assert len(tame) == 2 and all(after < before for before, after in tame)
    with pytest.warns(UserWarning, match="learn at layers.*: the loss diverged"):
        wild = errors(2, 1e3, 1e3)
    assert all(after <= before for before, after in wild)


def test_equal_sites_of_all_layers_share_a_program(batches):
    before = rescale._factor._cache_size()
    methods.parse("smoothquant(0.4321, sites='all')")(build("llama", 3), batches)
    assert 0 < rescale._factor._cache_size() - before <= 4  # inputs of a block


@pytest.mark.parametrize("symmetric", (True, False))
def test_soft_rounding_has_the_values_of_the_format(symmetric):
    x = jax.random.normal(jax.random.key(8), (6, 40))
    format = ActivationFormat(3, symmetric=symmetric)
    soft = ActivationQuantized(jnp.eye(40), softened(format))
    stored = ActivationQuantized(jnp.eye(40), format)
    np.testing.assert_allclose(soft.dot(x), stored.dot(x), atol=1e-6)
    slope = jax.grad(lambda x: soft.dot(x).sum())(x)
    assert (slope != 0).all() and jnp.isfinite(slope).all()


@pytest.mark.parametrize("symmetric", (True, False))
def test_slopes_of_ranges_survive_values_that_are_computed_twice(symmetric):
    """At optimization level 0 XLA rounds the inputs in two ways in one program."""
    x, w = (jax.random.normal(jax.random.key(k), (4, 24, 32)) for k in (0, 2))
    format = softened(ActivationFormat(4, symmetric=symmetric))
    rounding = clipping(3, 16, symmetric=symmetric).call

    def loss(factor, theta):
        turned = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        turned = turned * jnp.exp(-factor)[None, None] - factor[None, None]
        small = rounding.soft(theta, w[0] * jnp.exp(factor)[None] + factor[None])
        return ((format.round(turned) @ small.T) ** 2).mean()

    theta, factor = rounding.start(w[0], None, None), jnp.linspace(-1, 1, 32)
    # XLA's usual ones, which conftest leaves out where they are an option.
    flag = "xla_cpu_use_fusion_emitters"
    emitters = {flag: True} if flag in os.environ["XLA_FLAGS"] else {}
    found = [
        jax.jit(
            jax.grad(loss, (0, 1)),
            compiler_options=emitters | {"xla_backend_optimization_level": level},
        )(factor, theta)
        for level in (0, 2)
    ]
    assert (jnp.abs(found[1][0]) > 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4), *found)


def test_the_walk_carries_the_unchanged_model_along(batches):
    model, seen_by = build("llama"), {}

    def visit(params, path, seen):
        seen_by[path] = seen
        return jax.tree.map(jnp.zeros_like, params)

    walk(model, batches, (), visit, exact=True, wants=lambda p: p.startswith("layers"))
    second = seen_by["layers.1"]
    block, own = model.config.blocks()[0][1], get(model.params, "layers.0")
    for first, later in zip(seen_by["layers.0"].exact, second.exact, strict=True):
        np.testing.assert_allclose(target(block, own, *first), later[0], atol=1e-5)
    assert jnp.abs(second.exact[0][0] - second.inputs[0][0]).max() > 0.1
