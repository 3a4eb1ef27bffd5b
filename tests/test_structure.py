"""Pruning and structure: exchanged masks, gates, and models that become smaller."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.batch import Batch
from jaxllm.core.compose import Context, plan
from jaxllm.core.gates import top_inputs
from jaxllm.core.metrics import diagonal
from jaxllm.core.model import Model, get, weight, with_weight
from jaxllm.core.patterns import Pattern, parse_pattern
from jaxllm.core.regrow import regrow
from jaxllm.core.slicing import cut_units, cut_width
from jaxllm.core.slopes import cross_entropy, slopes
from jaxllm.core.solvers import nearest
from jaxllm.core.stats import Stats
from jaxllm.core.units import bias_fix, fluctuation, look, regression
from jaxllm.core.weights import Gated
from jaxllm.models import MLP, Attention, Layer, MoE, Norm, Transformer, hub, init

ROWS, OUT = 32, 12


@pytest.fixture(scope="module")
def layer():
    """A weight and inputs with a mean, on which the expected error depends."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (ROWS, OUT))
    mean = 2 * jax.random.normal(keys[1], (ROWS,))
    x = jax.random.normal(keys[2], (256, ROWS)) + mean[None]
    return w, x, Stats.of(("moments",), x)


def mean_error(x, w, made):
    return jnp.abs((x @ (made.materialize() - w)).mean(0))


@pytest.mark.parametrize("pattern", (0.6, "2:4"))
def test_exchange_lowers_the_mean_error_and_keeps_values_and_counts(pattern, layer):
    w, x, stats = layer
    target = parse_pattern(pattern)
    before = nearest(target, diagonal())(w, stats)
    after = regrow(target, threshold=0.0)(w, stats)
    mask = after.support
    np.testing.assert_array_equal(after.materialize(), jnp.where(mask, w, 0))
    np.testing.assert_array_equal(mask.sum(0), before.support.sum(0))
    if pattern == "2:4":
        assert (mask.reshape(-1, 4, OUT).sum(1) == 2).all()
    old, new = mean_error(x, w, before), mean_error(x, w, after)
    assert (new <= old + 1e-4).all() and new.sum() < 0.75 * old.sum()
    same = regrow(target, cycles=0)(w, stats)
    np.testing.assert_array_equal(same.support, before.support)


def test_a_pattern_of_the_whole_layer_cannot_exchange():
    with pytest.raises(ValueError, match="joint pattern"):
        regrow(Pattern(0.5, joint=True))


def test_the_gate_is_optimal_for_orthogonal_rows():
    """No other choice of k inputs has a smaller output error (the paper's lemma)."""
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (7, 7)))[0]
    w = jnp.exp(jnp.linspace(-2, 2, 7))[:, None] * turn
    x = jax.random.normal(jax.random.key(2), (20, 7))
    made = top_inputs(3 / 7, dtype="float32")(w, None)
    errors = jnp.linalg.norm(made.dot(x) - x @ w, axis=-1)
    choices = [jnp.zeros(7).at[jnp.array(c)].set(1) for c in
               itertools.combinations(range(7), 3)]  # fmt: skip
    best = jnp.stack(
        [jnp.linalg.norm((x * c[None] - x) @ w, axis=-1) for c in choices]
    ).min(0)
    np.testing.assert_allclose(errors, best, rtol=1e-4)
    plain = top_inputs(3 / 7, weighted=False, dtype="float32")(w, None)
    worse = jnp.linalg.norm(plain.dot(x) - x @ w, axis=-1)
    assert (worse >= errors - 1e-4).all() and worse.mean() > 1.2 * errors.mean()


def test_a_gate_lets_exactly_its_count_through_and_experts_share_it():
    w = jax.random.normal(jax.random.key(3), (ROWS, OUT))
    gated = Gated(w, jnp.ones(ROWS), kept=5)
    x = jax.random.normal(jax.random.key(4), (3, 4, ROWS))
    assert ((gated.before(x) != 0).sum(-1) == 5).all()
    np.testing.assert_allclose(gated.dot(x), gated.before(x) @ w, atol=1e-5)


def tiny(**changes) -> Transformer:
    layer = Layer(Attention(4, 2, 8), MLP(24))
    return Transformer(64, 32, (layer,) * 3, init_std=0.2, **changes)


@pytest.fixture(scope="module")
def model():
    return init(tiny(tied=True), jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
    tokens = jax.random.randint(jax.random.key(1), (2, 4, 24), 0, 64)
    return [Batch(t) for t in tokens]


def drift(a, b, tokens) -> float:
    """Largest difference of logits, relative to the largest logit."""
    before = a(tokens)
    return float(jnp.abs(b(tokens) - before).max() / jnp.abs(before).max())


KEEP_ALL = {
    "compresso": "compresso(0.0)",
    "flap": "flap(0.0)",
    "wanda_sp": "wanda_sp(0.0)",
    "llm_pruner": "llm_pruner(0.0)",
    "minitron": "minitron(hidden=0.001, heads=0.001)",
    "modegpt": "modegpt(0.0)",
    "shortgpt": "shortgpt(0)",
    "slicegpt": "slicegpt(0.0)",
    "ziplm": "ziplm(1.0, cost='weights')",
}
EXAMPLES = {
    "ziplm": {"cost": "weights", "levels": 6},  # repeats everywhere
    "compresso": {"steps": 4},
}
FAMILY = [n for n, e in methods.entries().items() if e.family == "structure"]


@pytest.mark.parametrize("name", FAMILY)
def test_keeping_everything_keeps_the_logits(name, model, batches):
    made = methods.parse(KEEP_ALL[name])(model, batches)
    assert drift(model, made, batches[0].tokens) < 2e-5


@pytest.mark.parametrize("name", FAMILY)
def test_the_result_is_smaller_and_dense_and_a_model(name, model, batches):
    step = methods.find(name)(**EXAMPLES.get(name, {}))
    made = step(model, batches)
    leaves = jax.tree.leaves(made.params)
    assert not any(weights.compressed(x) for x in leaves)
    paths = made.config.linears()
    size = lambda m, ps: sum(weight(m, p).size for p in ps)  # noqa: E731
    assert size(made, paths) < 0.95 * size(model, model.config.linears())
    shapes = jax.eval_shape(lambda: init(made.config, jax.random.key(0))).params
    for path in paths:
        assert weight(made, path).shape == get(shapes, f"{path}.weight").shape
    tokens = batches[0].tokens
    scanned = made.config.forward(made.params, tokens, scan=True)
    np.testing.assert_allclose(made(tokens), scanned, atol=1e-4)
    assert bool(jnp.isfinite(made(tokens)).all())
    planned = plan(step, model, batches)
    rest = size(planned, planned.config.linears())
    assert abs(rest / size(made, paths) - 1) < 0.25  # steps are coarse here


@pytest.mark.parametrize(
    "spec",
    ("slicegpt(0.25)", "minitron(0.25, 0.25, 0.5, 1)", "shortgpt(1)", "wanda_sp(0.3)"),
)
def test_what_its_family_can_express_is_exported(spec, model, batches, tmp_path):
    made = methods.parse(spec)(_exportable(model), batches)
    again = hub.load_folder(hub.save_pretrained(made, tmp_path / "out"))
    assert drift(made, again, batches[0].tokens) < 1e-5


def _exportable(model: Model) -> Model:
    """With the initialisation's scale that import assumes."""
    return model.replace(config=dataclasses.replace(model.config, init_std=0.02))


def test_uneven_shapes_are_not_exported(model, batches, tmp_path):
    model = _exportable(model)
    made = methods.parse("where('layers.1', wanda_sp(0.5))")(model, batches)
    with pytest.raises(ValueError, match=r"layers\.1\."):
        hub.save_pretrained(made, tmp_path / "out")
    untouched = get(made.params, "layers.0.mlp.up.weight")
    assert untouched is get(model.params, "layers.0.mlp.up.weight")


KINDS = {
    "llama": tiny(),
    "gemma": tiny(embed_scale=2.0, norm=Norm(plus_one=True)),
    "parallel": dataclasses.replace(
        tiny(), layers=(Layer(Attention(4, 4, 8, bias=True), MLP(24), parallel=True),)
    ),
    "experts": dataclasses.replace(
        tiny(), layers=(Layer(Attention(4, 2, 8), MoE(4, 2, 16, shared=MLP(24))),)
    ),
}


def quiet(model: Model, path: str, dead, axis: int) -> Model:
    w = jnp.moveaxis(weight(model, path), axis, 0).at[jnp.array(dead)].set(0.0)
    return with_weight(model, path, jnp.moveaxis(w, 0, axis))


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nobody_reads_go_without_a_trace(kind, batches):
    """Heads and channels whose output weights are zero: the logits stay."""
    model = init(KINDS[kind], jax.random.key(3))
    kept, tokens = {}, batches[0].tokens
    for units in model.config.units():
        size = weight(model, units.input).shape[0] // units.count
        model = quiet(model, units.input, range(size, 2 * size), 0)
        left = [i for i in range(units.count) if i != 1]
        kept[units.path] = jnp.array(left)
    made = cut_units(model, kept)
    assert drift(model, made, tokens) < 1e-5
    counts = {u.path: u.count for u in made.config.units()}
    assert counts == {p: len(k) for p, k in kept.items()} and counts


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_the_stream_that_are_zero_go_without_a_trace(kind, batches):
    """Norms keep dividing by the old width: their scale and eps make up for it."""
    model = init(KINDS[kind], jax.random.key(4))
    config = model.config
    grown = dict(eps=0.1, plus_one=kind == "gemma")
    layers = tuple(dataclasses.replace(x, norm=Norm(**grown)) for x in config.layers)
    config = dataclasses.replace(config, layers=layers, norm=Norm(**grown))
    model, dead = model.replace(config=config), (0, 5, 6)
    model = quiet(model, "embed", dead, 0)
    for path in config.residual().writers:
        model = quiet(model, path, dead, -1)
    kept = jnp.array([i for i in range(32) if i not in dead])
    made = cut_width(model, kept)
    assert made.config.width == 29
    assert drift(model, made, batches[0].tokens) < 1e-5


def test_a_layer_that_adds_nothing_is_the_first_to_go(model, batches):
    idle = quiet(quiet(model, "layers.1.attn.o", range(32), 0), "layers.1.mlp.down",
                 range(24), 0)  # fmt: skip
    for score in ("influence", "loss"):
        made = methods.parse(f"shortgpt(1, score={score!r})")(idle, batches)
        assert drift(idle, made, batches[0].tokens) < 1e-6
        kept = get(made.params, "layers.1.attn.q.weight")
        assert kept is get(model.params, "layers.2.attn.q.weight")


@pytest.fixture(scope="module")
def reader():
    """A weight and correlated inputs: what goes can be told from what stays."""
    keys = jax.random.split(jax.random.key(5), 3)
    hidden = jax.random.normal(keys[0], (400, 12))
    x = 3.0 + hidden @ jax.random.normal(keys[1], (12, ROWS))
    w = jax.random.normal(keys[2], (ROWS, OUT))
    return w, x, Stats.of(("gram", "moments"), x)


def test_mends_lower_the_error_and_least_squares_is_the_optimum(reader):
    w, x, stats = reader
    kept = jnp.arange(0, ROWS, 2)
    goal = x @ w

    def error(rows, bias=0.0):
        return float(jnp.linalg.norm(x[:, kept] @ rows + bias - goal))

    plain = error(w[kept])
    rows, bias = bias_fix()(w, kept, stats)
    np.testing.assert_allclose(bias, (x @ w - x[:, kept] @ w[kept]).mean(0), atol=1e-3)
    assert error(rows, bias) < 0.9 * plain
    solved, none = regression(0.0)(w, kept, stats)
    best = np.linalg.lstsq(np.float64(x[:, kept]), np.float64(goal), rcond=None)[0]
    assert none is None and error(solved) < 1.05 * error(jnp.asarray(best)) + 1e-2
    assert error(solved) < 0.2 * plain
    whole, _ = regression(0.1)(w, jnp.arange(ROWS), stats)
    np.testing.assert_allclose(whole, w, atol=1e-5)


def test_a_constant_unit_is_free_for_flap(model, batches):
    """Its fluctuation is zero, and the bias gives exactly what it gave."""
    path, still = "layers.2.mlp", 3
    constant = quiet(model, f"{path}.gate", range(24), -1)  # silu(0) u = 0 everywhere
    made = methods.parse("where('layers.2.mlp', flap(0.5, 'part'))")(constant, batches)
    assert drift(constant, made, batches[0].tokens) < 1e-6
    w = weight(model, f"{path}.gate")
    moves = jnp.abs(fluctuation(False)(_part(model, batches, path)))
    stops = jnp.abs(fluctuation(False)(_part(with_weight(
        model, f"{path}.gate", w.at[:, still].set(0.0)), batches, path)))  # fmt: skip
    assert stops[still] == 0 and moves[still] > 0


def _part(model, batches, path):
    context = Context(batches, jax.random.key(0))
    return next(p for p in look(model, context, {"moments"}) if p.units.path == path)


def test_the_taylor_score_is_the_loss_of_removal_to_first_order(model, batches):
    """|sum of w g| over a unit's rows predicts the change for a small step."""
    (units, *_) = model.config.units()
    found = slopes(model, batches, (units.input,))[units.input][0]
    w = weight(model, units.input)
    step = 1e-3
    losses = [
        np.mean([float(cross_entropy(with_weight(model, units.input, s * w), b))
                 for b in batches]) for s in (1 + step, 1 - step)
    ]  # fmt: skip
    slope = (losses[0] - losses[1]) / (2 * step)
    assert abs(slope - float((w * found).sum())) < 0.05 * abs(slope) + 1e-3


def test_the_principal_axes_keep_more_of_the_stream(model, batches):
    """At equal width, slicing along them changes the logits least."""
    tokens = batches[0].tokens
    turned = methods.parse("slicegpt(0.25)")(model, batches)
    plain = methods.parse("minitron(0.25, 0, 0)")(model, batches)
    error = lambda m: float(jnp.abs(m(tokens) - model(tokens)).mean())  # noqa: E731
    assert turned.config.width == plain.config.width == 24
    assert error(turned) < error(plain)


@pytest.mark.parametrize(
    "text, needle",
    (
        ("where('layers.0', slicegpt())", "cannot be narrowed"),
        ("where('layers.0', shortgpt())", "cannot be narrowed"),
        ("where('layers.*.mlp.up', flap(0.2))", "no whole part"),
        ("shortgpt(3)", "at least one has to stay"),
        ("compose(rtn(4, 16), wanda_sp(0.2))", "cut before compressing"),
        ("compose(rtn(4, 16), llm_pruner(0.2))", "no dense gradient"),
        ("slicegpt(multiple=64)", "multiple 64"),
    ),
)
def test_what_cannot_be_cut_is_refused(text, needle, model, batches):
    with pytest.raises((TypeError, ValueError), match=needle):
        methods.parse(text)(model, batches)


def test_the_cut_model_is_open_to_everything_after_it(model, batches):
    spec = "compose(slicegpt(0.25), flap(0.25), gptq(4, group_size=8))"
    made = methods.parse(spec)(model, batches)
    assert len(made.history.specs) == 3
    assert weights.compressed(weight(made, "layers.0.mlp.down"))
    assert bool(jnp.isfinite(made(batches[0].tokens)).all())
