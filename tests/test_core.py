"""Solvers, allocation and reconstruction against what they promise."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.allocate import allocate
from jaxllm.core.batch import Batch
from jaxllm.core.codebooks import DigitPlanes
from jaxllm.core.compose import compose, plan, transform
from jaxllm.core.formats import Integer, normal_float, parse_format
from jaxllm.core.metrics import gram
from jaxllm.core.model import (
    History,
    Model,
    combine,
    get,
    partition,
    put,
    weight,
)
from jaxllm.core.patterns import Pattern
from jaxllm.core.reconstruct import clipping, reconstruct
from jaxllm.core.scales import Grid, absmax, half_quadratic, mse, power_of_two
from jaxllm.core.solvers import nearest, obs, svd
from jaxllm.core.spec import decode, encode
from jaxllm.core.stats import Stats, output_energy
from jaxllm.core.walk import Monitor, walk
from jaxllm.core.weights import ActivationQuantized
from jaxllm.models import MLP, Attention, Layer, Transformer, init

ROWS, OUT = 48, 20


@pytest.fixture(scope="module")
def layer():
    """A weight and correlated inputs with a few strong channels."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (ROWS, OUT))
    mix = (
        jax.random.normal(keys[1], (ROWS, ROWS))
        * jnp.exp(jnp.linspace(-2, 1, ROWS))[None]
    )
    x = jax.random.normal(keys[2], (512, ROWS)) @ mix
    return w, x, Stats.of(("gram", "moments", "absmax"), x)


def error(x, w, made) -> float:
    y = x @ w
    delta = x @ weights.materialize(made) - y
    return float(jnp.linalg.norm(delta) / jnp.linalg.norm(y))


SETS = {
    "int3": Grid(Integer(3), 16),
    "int4 per output": Grid(Integer(4)),
    "nf4": Grid(normal_float(4), 16),
    "mx": Grid(Integer(4, True), 16, power_of_two(absmax())),
    "searched": Grid(Integer(2), 16, mse()),
    "2:4": Pattern(0.5, 4),
    "half": Pattern(0.5),
    "joint": Pattern(0.5, 16, joint=True),
}


@pytest.mark.parametrize("name", SETS)
def test_obs_is_better_than_nearest_at_equal_bytes(name, layer):
    w, x, stats = layer
    near, far = obs(SETS[name])(w, stats), nearest(SETS[name])(w, stats)
    assert weights.nbytes(near) == weights.nbytes(far)
    assert error(x, w, near) < error(x, w, far) * 0.97


@pytest.mark.parametrize("name", SETS)
def test_statistics_add_up(name, layer):
    """Two half batches give the solution of the whole."""
    w, x, stats = layer
    names = ("gram", "moments", "absmax")
    halves = Stats.of(names, x[:256]) + Stats.of(names, x[256:])
    whole = weights.materialize(obs(SETS[name])(w, stats))
    again = weights.materialize(obs(SETS[name])(w, halves))
    assert (jnp.abs(whole - again) > 1e-3).mean() < 0.02


def test_means_of_two_batches_are_those_of_both_together(layer):
    """Counts add up as sums do: nothing of a batch is forgotten."""
    _, x, _ = layer
    names = ("gram", "moments", "absmax", "histogram")
    weighting = jnp.arange(512) % 3 / 2
    parts = [slice(0, 100), slice(100, 512)]
    halves = [Stats.of(names, x[p], weighting[p]) for p in parts]
    whole, both = Stats.of(names, x, weighting), halves[0] + halves[1]
    for found, expected in (
        (both.gram.mean, whole.gram.mean),
        (both.moments.mean_square, whole.moments.mean_square),
        (both.moments.variance, whole.moments.variance),
        (both.absmax.value, whole.absmax.value),
        (both.histogram.counts, whole.histogram.counts),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    by_hand = (x * weighting[:, None]).T @ x / weighting.sum()
    np.testing.assert_allclose(both.gram.mean, by_hand, rtol=1e-3, atol=1e-2)


def test_a_block_sees_the_inputs_that_the_changed_prefix_gives(model, batches):
    """Statistics of layer 1 are those behind the new layer 0, not the old one."""

    def statistics(model, change):
        seen = {}

        def visit(params, path, found):
            seen[path] = found.stats
            if not change or path != "layers.0":
                return params
            halved = jax.tree.map(lambda x: 0.5 * x, get(params, path))
            return put(params, path, halved)

        blocks = lambda path: path.startswith("layers")  # noqa: E731
        after = walk(model, batches, ("gram",), visit, wants=blocks)
        return seen, after

    changing, changed = statistics(model, True)
    expected, dense = statistics(changed, False)[0], statistics(model, False)[0]
    same = lambda a, b: jax.tree.all(jax.tree.map(jnp.allclose, a, b))  # noqa: E731
    assert same(changing["layers.1"], expected["layers.1"])
    assert not same(changing["layers.1"], dense["layers.1"])
    assert same(changing["layers.0"], dense["layers.0"])


def test_a_calibration_in_which_nothing_counts_is_refused(model, batches):
    muted = [dataclasses.replace(batches[0], weights=jnp.zeros((4, 24)))]
    for spec in ("gptq(4, group_size=8)", "llm_pruner()", "squeezellm()"):
        for data, words in (([], "no batches"), (iter(()), "no"), (muted, "weight 0")):
            with pytest.raises(ValueError, match=f"calibration.*{words}"):
                methods.parse(spec)(model, data)


def test_an_iterator_of_batches_serves_several_passes(model, batches):
    step = methods.parse("gptq(4, group_size=8)")
    once, again = step(model, iter(batches)), step(model, batches)
    jax.tree.map(np.testing.assert_array_equal, once.params, again.params)


@pytest.mark.parametrize(
    "make, words",
    (
        (lambda: parse_format("nf0"), "levels of 0 bits; accepted: 2 to 8"),
        (lambda: normal_float(1), "levels of 1 bits"),
        (lambda: Pattern(0.5, 0), "block 0; accepted: None or at least 1"),
        (lambda: methods.parse("sparsegpt(block_size=-3)"), "block -3"),
        (lambda: methods.parse("svd(rank=0)"), "rank 0; accepted: at least 1"),
        (lambda: methods.parse("asvd(rank=0)"), "rank 0"),
        (lambda: methods.parse("svd_llm(rank=-1)"), "rank -1"),
        (lambda: DigitPlanes(2, steps=-1), "-1 steps; accepted: 0 or more"),
    ),
)
def test_sizes_out_of_range_are_refused_with_what_is_accepted(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("symmetric", (True, False))
def test_each_output_of_each_group_has_a_scale_of_its_own(symmetric):
    """Half a step of its own range is the most that any weight may err."""
    sizes = jnp.exp(jnp.linspace(-4, 4, OUT))[None] * jnp.exp(jnp.arange(3))[:, None]
    w = jax.random.uniform(jax.random.key(4), (ROWS, OUT), minval=-1.0, maxval=1.0)
    w = (w.reshape(3, 16, OUT) * sizes[:, None]).reshape(ROWS, OUT)
    made = nearest(Grid(Integer(4, symmetric), 16))(w, None)
    groups = w.reshape(3, 16, OUT)
    if symmetric:
        step = jnp.abs(groups).max(1) / 7
    else:
        step = (groups.max(1) - groups.min(1)) / 15
    error = jnp.abs(made.materialize() - w).reshape(groups.shape).max(1)
    assert (error <= 0.55 * step).all()  # scales are stored in bfloat16


def test_damping_is_a_share_of_the_mean_diagonal():
    """GPTQ, section 3.3 (step 3); an input that never fires gets a unit diagonal."""
    x = jax.random.normal(jax.random.key(5), (64, 8)).at[:, 3].set(0.0)
    h = np.float64(x).T @ np.float64(x) / 64
    found = gram(0.25)(Stats.of(("gram",), x), 8)
    expected = h + 0.25 * np.trace(h) / 8 * np.eye(8)
    expected[3, 3] += 1
    np.testing.assert_allclose(found.full(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.importance, np.diag(h), rtol=1e-5)


def test_gram_through_an_op_is_the_gram_of_the_outputs(layer):
    _, x, stats = layer
    op = weights.Hadamard(jnp.sign(x[0]))
    through = stats.gram.through(op).total
    expected = Stats.of(("gram",), op.apply(x)).gram.total
    np.testing.assert_allclose(through, expected, rtol=2e-3, atol=0.05)


def test_svd_in_the_gram_metric_is_optimal(layer):
    """No matrix of the rank has a smaller output error: compare with the bound."""
    w, x, stats = layer
    made = svd(rank=6, metric=gram(1e-6))(w, stats)
    y = np.float64(x) @ np.float64(w)
    tail = np.linalg.svd(y, compute_uv=False)[6:]
    bound = np.linalg.norm(tail) / np.linalg.norm(y)
    assert bound <= error(x, w, made) < bound * 1.01
    assert error(x, w, made) < error(x, w, svd(rank=6)(w, None))


def test_half_quadratic_lowers_its_own_error():
    w = jax.random.t(jax.random.key(3), 3.0, (64, 32))
    plain = nearest(Grid(Integer(3), 32))(w, None)
    fitted = nearest(Grid(Integer(3), 32, half_quadratic(), real_zero=True))(w, None)
    loss = lambda made: (jnp.abs(w - made.materialize()) ** 0.7).sum()  # noqa: E731
    assert loss(fitted) < loss(plain)


def test_activation_order_helps_when_channels_differ(layer):
    w, x, stats = layer
    target = Grid(Integer(3), 16)
    given, sorted_ = obs(target)(w, stats), obs(target, order="activation")(w, stats)
    assert weights.nbytes(given) == weights.nbytes(sorted_)
    assert error(x, w, sorted_) < error(x, w, given) * 1.1


@pytest.mark.parametrize("solver", ("milp", "greedy"))
def test_allocation_meets_the_budget(solver):
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = np.sort(rng.integers(1, 50, (4, 3)), 1)
        losses = -np.sort(-rng.random((4, 3)), 1)
        budget = int(rng.integers(costs.min(1).sum(), costs.max(1).sum() + 1))
        chosen = allocate(losses, costs, budget, solver)
        rows = range(4)
        assert sum(costs[i, chosen[i]] for i in rows) <= budget
        possible = [
            sum(losses[i, c[i]] for i in rows)
            for c in itertools.product(range(3), repeat=4)
            if sum(costs[i, c[i]] for i in rows) <= budget
        ]
        ours = sum(losses[i, chosen[i]] for i in rows)
        assert ours <= min(possible) + (1e-9 if solver == "milp" else 0.6)


def test_an_impossible_budget_says_what_is_possible():
    with pytest.raises(ValueError, match=r"budget of 10 bytes; the smallest.* take 12"):
        allocate([[1.0], [1.0]], [[5], [7]], 10)


@pytest.fixture(scope="module")
def model():
    layers = (Layer(Attention(4, 2, 8), MLP(32)),) * 2
    return init(Transformer(64, 32, layers, init_std=0.3), jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
    tokens = jax.random.randint(jax.random.key(1), (2, 4, 24), 0, 64)
    return [Batch(t) for t in tokens]


def test_mixed_precision_meets_its_budget_and_beats_one_width(model, batches):
    spec = "mixed((rtn(2, 16), rtn(3, 16), rtn(4, 16)), bits=4.6)"
    step = methods.parse(spec)
    assert methods.parse(repr(step)) == step
    small = step(model, batches)
    paths = model.config.linears()
    size = sum(weights.nbytes(weight(small, p)) for p in paths)
    entries = sum(weights.size(weight(model, p)) for p in paths)
    assert size * 8 / entries <= 4.6
    widths = {weight(small, p).format.bits for p in paths}
    assert len(widths) > 1
    tokens = batches[0].tokens
    drift = lambda m: float(jnp.abs(m(tokens) - model(tokens)).mean())  # noqa: E731
    assert drift(small) < drift(methods.parse("rtn(3, 16)")(model))
    planned = plan(step, model, batches)
    assert sum(weights.nbytes(weight(planned, p)) for p in paths) * 8 / entries <= 4.6


def test_mixed_refuses_what_is_not_per_layer(model, batches):
    with pytest.raises(TypeError, match="not a per-layer method"):
        methods.parse("mixed((quarot(),), bits=4)")
    with pytest.raises(ValueError, match="smallest options"):
        methods.parse("mixed((rtn(4, 16),), bits=2)")(model, batches)


def test_learned_clipping_renders_what_it_optimised():
    w = jax.random.normal(jax.random.key(2), (40, 12))
    made = clipping(3, 16).call
    theta = jax.tree.map(lambda t: t - 2.5, made.start(w, None, None))
    soft, stored = made.soft(theta, w), made.render(theta, w)
    np.testing.assert_allclose(soft, stored.materialize(), atol=2e-3)
    slope = jax.grad(lambda t: (made.soft(t, w) ** 2).sum())(theta)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(slope))


def test_reconstruction_never_ends_above_its_start(model, batches):
    @transform
    def learned(epochs: int = 4, rate: float = 0.05):
        """Learned clipping by reconstruction."""
        return reconstruct(clipping(3, 16), epochs=epochs, rate=rate)

    monitor = Monitor(progress=False)
    small = learned()(model, batches, monitor=monitor)
    errors = [(e["error_before"], e["error_after"]) for e in monitor.events]
    assert len(errors) == 2 and all(after < before for before, after in errors)
    assert weight(small, "layers.0.mlp.up").format == Integer(3)
    wild = Monitor(progress=False)
    learned(rate=50.0)(model, batches, monitor=wild)
    assert all(e["error_after"] <= e["error_before"] for e in wild.events)


def test_partition_and_combine_are_inverse(model):
    adapted = methods.parse("lora(2)")(model)
    mine, rest = partition(adapted, lambda path, leaf: ".terms.1." in f".{path}.")
    count = len(jax.tree.leaves(mine))
    assert count == 2 * len(model.config.linears())
    whole = combine(mine, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(adapted)
    jax.tree.map(np.testing.assert_array_equal, whole.params, adapted.params)


@pytest.mark.parametrize(
    "spec", ["nf4(group_size=32)", "magnitude('2:4') + rtn(4, 32)", "svd(0.5)"]
)
def test_adapters_start_beside_any_weight_without_changing_it(spec, model):
    """QLoRA by composition: what is stored is kept, and B = 0."""
    small = compose(*map(methods.parse, spec.split(" + ")))(model)
    adapted = methods.parse("lora(2)")(small)
    for path in model.config.linears():
        w, both = weight(small, path), weight(adapted, path)
        assert jax.tree.structure(both.terms[0]) == jax.tree.structure(w)
        np.testing.assert_array_equal(both.materialize(), w.materialize())
    rounded = methods.parse("quarot(bits=None, activation_bits=8, rotate=False)")
    assert isinstance(weight(rounded(small), path), ActivationQuantized)


@pytest.mark.parametrize(
    "spec",
    [
        "compose(nf4(), where('layers.0', compose(pissa(4), nf4(group_size=32))))",
        "trained_only(nearest(Grid(Integer(4))), 'scale', 'zero')",
    ],
)
def test_any_number_of_arguments_prints_and_is_stored_as_a_call(spec):
    made = methods.parse(spec)
    assert methods.parse(repr(made)) == made
    assert decode(encode(made), methods.find) == made


def test_history_never_splits_a_trace(model):
    """Two models that differ in history share one compilation."""
    traces = []

    @jax.jit
    def run(m: Model):
        traces.append(1)
        return m.params["norm"]["scale"]

    run(model)
    run(model.replace(history=History(("something",), "elsewhere")))
    assert len(traces) == 1
    both = jax.tree.map(jnp.add, model, model.replace(history=History(("x",))))
    assert both.history.specs == model.history.specs


def test_probes_find_the_error_of_many_outputs():
    """Exactly for few outputs; else nearly, in the scale and in what is least."""
    x = jax.random.normal(jax.random.key(1), (256, 64)) * jnp.linspace(0.1, 3, 64)
    h = Stats.of(("gram",), x).gram.mean
    w = jax.random.normal(jax.random.key(2), (64, 1024))
    few = w[:, :32]
    exact = jnp.square(x @ few).sum(1).mean()
    assert jnp.allclose(output_energy(h, few, 4), exact, rtol=1e-4)
    for scale in (1.0, 0.9):  # the same draw for all that is compared
        exact = jnp.square(x @ (scale * w)).sum(1).mean()
        assert jnp.allclose(output_energy(h, scale * w, 64), exact, rtol=0.05)
