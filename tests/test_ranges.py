"""Static ranges of activations: found by calibration, or learned through the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equivalences import LAYERS, build, same_function

from jaxllm import methods
from jaxllm.core.batch import Batch
from jaxllm.core.compose import Context, transform, where
from jaxllm.core.formats import ActivationFormat, Integer, MixedActivation
from jaxllm.core.learned import Recipe
from jaxllm.core.model import get, put, weight
from jaxllm.core.ranges import found_range, percentile, static_inputs, static_range
from jaxllm.core.reconstruct import clipping
from jaxllm.core.scales import absmax
from jaxllm.core.stats import Samples
from jaxllm.core.walk import Monitor, walk
from jaxllm.core.weights import Hadamard, StaticInput
from jaxllm.core.whole import Whole, _runs, _started, last_hidden, next_token, rescaling
from jaxllm.models import MLP, Attention, Layer, MoE, Transformer, init

BYTES = ActivationFormat(8)


@pytest.fixture(scope="module")
def batches():
    """The first token of each row does not count."""
    tokens = jax.random.randint(jax.random.key(2), (2, 4, 24), 0, 64)
    count = jnp.ones((4, 24)).at[:, 0].set(0.0)
    return [Batch(t, weights=count) for t in tokens]


@transform
def ranged(format=BYTES, rule=absmax()):
    return static_inputs(format, rule)


def peaks(model, batches, block: str):
    """The largest counted input at each tap of a block, by the walk's statistics."""
    found = {}

    def visit(params, path, seen):
        if path == block:
            found.update(
                {t: float(s.absmax.value.max()) for t, s in seen.stats.items()}
            )
        return params

    walk(model, batches, ("absmax",), visit)
    return found


def test_ranges_are_those_of_the_calibration_inputs(batches):
    """Of the dense inputs in the first block, behind rounded ones in the second."""
    model = build("llama")
    made = ranged(ActivationFormat(3))(model, batches)
    dense, small = (peaks(m, batches, "layers.0") for m in (model, made))
    seen = {s.tap: s.consumers for s in model.config.sites()}
    for tap, peak in dense.items():
        for path in seen[tap]:
            w = weight(made, path)
            assert isinstance(w, StaticInput) and w.zero is None
            np.testing.assert_allclose(w.scale, [peak / 3], rtol=1e-5)
    assert small["layers.0.attn.input"] == dense["layers.0.attn.input"]
    q = weight(made, "layers.1.attn.q")
    behind = peaks(made, batches, "layers.1")["layers.1.attn.input"]
    before = peaks(model, batches, "layers.1")["layers.1.attn.input"]
    np.testing.assert_allclose(q.scale, [behind / 3], rtol=1e-5)
    assert abs(behind - before) > 1e-3 * before


def test_tokens_that_do_not_count_widen_no_range(batches):
    x = jax.random.normal(jax.random.key(3), (40, 16)).at[7].mul(100)
    samples = Samples(x, jnp.ones(40).at[7].set(0.0))
    for rule in (absmax(), percentile(1.0)):
        scale, _ = found_range(BYTES, rule, (), [samples])
        peak = jnp.abs(jnp.delete(x, 7, 0)).max()
        np.testing.assert_allclose(scale, [peak / 127], rtol=1e-5)
    turned = Hadamard().apply(jnp.delete(x, 7, 0))
    scale, _ = found_range(BYTES, absmax(), (Hadamard(),), [samples])
    np.testing.assert_allclose(scale, [jnp.abs(turned).max() / 127], rtol=1e-5)


@pytest.mark.parametrize("share", (0.5, 0.9, 0.99, 1.0))
def test_percentiles_are_values_of_the_sample(share):
    """Against sorted values; three blocks have three ranges, a short one too."""
    x = jax.random.normal(jax.random.key(4), (50, 20)) * jnp.linspace(1, 3, 20)
    samples = [Samples(part, jnp.ones(len(part))) for part in (x[:20], x[20:])]
    format = ActivationFormat(8, block=8)
    scale, _ = found_range(format, percentile(share), (), samples)
    for i, part in enumerate(jnp.split(x, (8, 16), -1)):
        values = np.sort(np.abs(part).ravel())
        peak = values[int(np.ceil(share * len(values))) - 1]
        np.testing.assert_allclose(scale[i], peak / 127, rtol=1e-5)
    scale, zero = found_range(
        ActivationFormat(8, symmetric=False), percentile(share), (), samples
    )
    values = np.sort(np.ravel(x))
    keep = int(np.ceil((1 + share) / 2 * len(values))) - 1
    low, high = values[len(values) - 1 - keep], values[keep]
    np.testing.assert_allclose(scale, [(high - low) / 255], rtol=1e-4)
    np.testing.assert_array_equal(zero, np.round(-low / scale))


def test_experts_share_one_range(batches):
    layer = Layer(Attention(4, 2, 8), MoE(4, 2, 24, shared=MLP(16)))
    model = init(Transformer(64, 32, (layer,), init_std=0.2), jax.random.key(2))
    result = methods.parse("smoothquant(bits=8, static=True)")(model, batches)
    gate = weight(result, "layers.0.moe.experts.gate")
    assert gate.scale.shape == (4, 1) and len(set(gate.scale[:, 0].tolist())) == 1
    assert bool(jnp.isfinite(result(batches[0].tokens)).all())


def test_what_has_no_static_range_is_refused(batches):
    for format in (ActivationFormat(8, clip=0.9), MixedActivation(4, block=16)):
        with pytest.raises(ValueError, match="one width and a rule"):
            static_inputs(format)
    with pytest.raises(ValueError, match="in no block"):
        where("head", ranged())(build("llama"), batches)
    with pytest.raises(ValueError, match="need their bits"):
        methods.parse("dgq(activation_bits=None, static=True)")


def started(model, batches, bits: int, symmetric: bool):
    """A plan that learns everything, and its first theta."""
    format = ActivationFormat(bits, symmetric)
    recipe = Recipe(clipping(bits, None), rescaling(), static_range(format))
    plan = Whole(_runs(model, model.config.linears(), recipe), last_hidden())
    context = Context(batches, jax.random.key(0))
    return plan, _started(plan, model, context, format, absmax())


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_learned_is_what_is_stored(kind, symmetric, batches):
    """Equal blocks are one run; scales alone keep the logits, rounding agrees."""
    model = build(kind)
    plan, theta = started(model, batches, 4, symmetric)
    assert [run.paths for run in plan.runs] == [("layers.0", "layers.1")]
    moved = model
    for i, path in enumerate(plan.runs[0].paths):
        own = jax.tree.map(lambda x, i=i: x[i], theta[0])
        block = plan.runs[0].recipe.changed(own, get(model.params, path), 1.0)
        moved = moved.replace(params=put(moved.params, path, block))
    same_function(model, moved, batches[0].tokens)
    soft, stored = (plan.model(theta, model, s) for s in (True, False))
    down = weight(stored, "layers.1.mlp.down")
    assert down.inner.format == Integer(4)
    expected, found = soft(batches[0].tokens), stored(batches[0].tokens)
    wrong = jnp.abs(found - expected) > 1e-3 * jnp.abs(expected).max()
    assert wrong.mean() < 0.02  # ties of rounding may fall either way


@pytest.mark.parametrize("goal", (last_hidden(), next_token()))
def test_learning_lowers_the_error_that_is_then_deployed(goal, batches):
    model, monitor = build("llama"), Monitor(progress=False)
    spec = f"mobilequant(3, 6, epochs=8, rates=(0.02, 0.05, 0.02), goal={goal})"
    made = methods.parse(spec)(model, batches, monitor=monitor)
    event = monitor.events[-1]
    assert event["error_after"] < 0.9 * event["error_before"]

    def error(batch):
        errors = goal.call.error(goal.call.of(made, batch), goal.call.of(model, batch))
        return (errors * batch.weights).sum() / batch.weights.sum()

    deployed = float(jnp.stack([error(b) for b in batches]).mean())
    np.testing.assert_allclose(deployed, event["error_after"], rtol=0.05)
    q, k = (weight(made, f"layers.0.attn.{n}") for n in "qk")
    np.testing.assert_array_equal(q.scale, k.scale)  # they read one input
