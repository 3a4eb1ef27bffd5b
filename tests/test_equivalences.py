"""Equivalences of sites: folds are exact, and what is learned never ends up worse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core.batch import Batch
from jaxllm.core.compose import transform
from jaxllm.core.equivalences import fold, pooled, shiftable
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.migration import migrate
from jaxllm.core.model import get, put
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest
from jaxllm.core.walk import inputs_of
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
