"""Which layer gets what: prices, exact and evolutionary choice, learned masks."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.batch import Batch
from jaxllm.core.compose import Context, plan
from jaxllm.core.curvature import hessian_traces
from jaxllm.core.evolution import Evolution, divergence, evolve, filled, level_switch
from jaxllm.core.gradients import squared_gradients
from jaxllm.core.l0 import gate, open_chance
from jaxllm.core.model import Model, get, put, weight, with_weight
from jaxllm.core.sensitivity import SENSITIVITIES, sensitivity
from jaxllm.core.slopes import cross_entropy
from jaxllm.core.stats import Stats
from jaxllm.models import MLP, Attention, Layer, Transformer, init

PATH = "layers.0.attn.k"


@pytest.fixture(scope="module")
def model():
    layer = Layer(Attention(2, 1, 4), MLP(16))
    return init(Transformer(32, 16, (layer,) * 3, init_std=0.4), jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
    tokens = jax.random.randint(jax.random.key(1), (2, 4, 12), 0, 32)
    return [Batch(t) for t in tokens]


def stored_bits(small: Model, model: Model) -> float:
    paths = model.config.linears()
    size = sum(weights.nbytes(weight(small, p)) for p in paths)
    return 8 * size / sum(weights.size(weight(model, p)) for p in paths)


def test_traces_are_those_of_the_exact_hessian(batches):
    """Hutchinson's estimate against the full second derivative of 32 entries."""
    layer = Layer(Attention(2, 1, 4), None)
    small = init(Transformer(32, 8, (layer,), init_std=0.6), jax.random.key(0))
    batch = Batch(batches[0].tokens[:2])

    def loss(flat):
        w = flat.reshape(weight(small, PATH).shape)
        changed = small.replace(params=put(small.params, f"{PATH}.weight", w))
        return cross_entropy(changed, batch)

    exact = jnp.trace(jax.hessian(loss)(weight(small, PATH).ravel()))
    paths, key = (PATH, "layers.0.attn.v"), jax.random.key(2)
    found = hessian_traces(small, [batch], paths, 400, key)[PATH]
    assert abs(float(found - exact)) < 0.2 * abs(float(exact))


def test_prices_are_what_they_say(model, batches):
    """Each price of a changed weight, computed a second time from its definition."""
    w = weight(model, PATH)
    made = jnp.round(4 * w) / 4
    context = Context(batches, jax.random.key(0))
    x = jax.random.normal(jax.random.key(3), (50, len(w)))
    slopes = squared_gradients(model, batches, (PATH,))
    stats = Stats({**Stats.of(("gram",), x).items, "fisher": slopes[PATH]})
    price = {n: sensitivity(n)(model, context) for n in ("gram", "fisher", "loss")}
    found = {n: float(loss(PATH, w, made, stats)) for n, loss in price.items()}
    wanted = (jnp.square(x @ (w - made)).sum(1)).mean()
    np.testing.assert_allclose(found["gram"], wanted, rtol=1e-4)
    wanted = (slopes[PATH].mean * (w - made) ** 2).sum() / 2
    np.testing.assert_allclose(found["fisher"], wanted, rtol=1e-4)
    changed = with_weight(model, PATH, made)
    both = [[cross_entropy(m, b) for b in batches] for m in (changed, model)]
    wanted = np.mean(both[0]) - np.mean(both[1])
    np.testing.assert_allclose(found["loss"], wanted, atol=1e-6)


@pytest.mark.parametrize("name", SENSITIVITIES)
def test_mixed_precision_meets_its_budget(name, model, batches):
    spec = f"mixed_precision(5.2, group_size=8, sensitivity='{name}')"
    small = methods.parse(spec)(model, batches)
    assert stored_bits(small, model) <= 5.2
    planned = plan(methods.parse(spec), model, batches)
    assert stored_bits(planned, model) <= 5.2


def test_unknown_sensitivities_and_solvers_are_refused():
    with pytest.raises(ValueError, match="accepted: gram, fisher, trace, loss"):
        methods.parse("mixed_precision(4, sensitivity='grad')")
    with pytest.raises(ValueError, match="accepted: 'greedy', 'milp'"):
        methods.parse("mixed_precision(4, solver='dp')")
    with pytest.raises(ValueError, match="survivors"):
        methods.parse("evopress(4, survivors=(2, 3))")


def problem(seed: int):
    """Costs that rise, and losses that do not add up: some pairs of units interact."""
    rng = np.random.default_rng(seed)
    costs = np.cumsum(rng.integers(1, 9, (6, 3)), 1)
    alone = -np.sort(-rng.random((6, 3)), 1)
    pairs = 0.3 * rng.random((6, 6, 3, 3))

    def loss(levels, batches=1):
        total = sum(alone[i, a] for i, a in enumerate(levels))
        both = itertools.combinations(range(6), 2)
        return total + sum(pairs[i, j, levels[i], levels[j]] for i, j in both)

    return costs.tolist(), loss, int(costs.sum(0) @ (0.2, 0.6, 0.2))


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_best_within_the_budget_and_repeats(seed):
    costs, loss, budget = problem(seed)
    spent = lambda x: sum(row[a] for row, a in zip(costs, x, strict=True))  # noqa: E731
    every = [x for x in itertools.product(range(3), repeat=6) if spent(x) <= budget]
    search = Evolution(60, 16, (4, 1), (1, 1))

    def run(seed):
        rng = np.random.default_rng(seed)
        start, mutate = filled(costs, budget, rng), level_switch(costs, budget)
        assert spent(start) <= budget
        for _ in range(100):
            made = mutate(start, rng)
            assert spent(made) <= budget and all(0 <= a < 3 for a in made)
        return evolve(start, mutate, loss, search, rng)

    assert run(0) == run(0)
    best = min(map(loss, every))
    assert min(loss(run(s)) for s in range(3)) <= best + 1e-9


def test_selection_looks_again_with_more_data_and_keeps_the_parent():
    """What only the first, small selection likes does not survive the second."""
    fitness = lambda x, batches: x[0] if batches == 1 else -x[0]  # noqa: E731
    seen = iter(range(-50, 0))
    mutate = lambda levels, rng: (next(seen),)  # noqa: E731
    search = Evolution(3, 8, (2, 1), (1, 2))
    assert evolve((0,), mutate, fitness, search, np.random.default_rng(0)) == (0,)


def test_a_budget_below_the_lowest_levels_is_refused():
    with pytest.raises(ValueError, match=r"budget of 5 bytes; .* take 6"):
        filled([[2, 4], [4, 8]], 5, np.random.default_rng(0))


def test_evopress_searches_the_model_within_its_budget(model, batches):
    """No further from the dense model than where it starts, and again the same."""
    spec = "evopress(5.2, group_size=8, generations={}, offspring=4, batches=(1, 2))"
    start, found, again = (
        methods.parse(spec.format(n))(model, batches) for n in (0, 6, 6)
    )
    assert stored_bits(found, model) <= 5.2
    jax.tree.map(np.testing.assert_array_equal, found.params, again.params)
    judge = divergence(model, batches)
    assert judge(found, 2) < judge(start, 2)
    assert float(judge(model, 2)) < 1e-6


def test_evopress_leaves_out_the_layer_that_matters_least(model, batches):
    """A layer that writes nothing goes first; what is left is a shorter model."""
    params = model.params
    for path in ("layers.1.attn.o.weight", "layers.1.mlp.down.weight"):
        params = put(params, path, jnp.zeros_like(get(params, path)))
    idle = model.replace(params=params)
    small = methods.parse("evopress(None, drop=1, generations=4, offspring=4)")(
        idle, batches
    )
    assert len(small.config.layers) == 2
    tokens = batches[0].tokens
    np.testing.assert_allclose(small(tokens), idle(tokens), atol=1e-4)


def test_hard_concrete_gates_close_as_often_as_their_chance_says():
    log_alpha = jnp.linspace(-3, 3, 7)
    noise = jax.random.uniform(jax.random.key(0), (20000, 7), minval=1e-6)
    z = gate(jnp.broadcast_to(log_alpha, noise.shape), noise)
    assert bool(((z >= 0) & (z <= 1)).all()) and bool((z == 0).any())
    np.testing.assert_allclose((z > 0).mean(0), open_chance(log_alpha), atol=0.02)
    assert float(gate(jnp.array(2.5))) == 1.0 and float(gate(jnp.array(-2.5))) == 0.0


def test_learned_masks_cut_what_the_loss_can_spare(model, batches):
    """A quarter of the channels goes at no cost on the text it was learned on."""
    step = methods.parse("where('layers.0.mlp', compresso(0.25, steps=60, rank=0))")
    small = step(model, batches)
    assert small.config.layers[0].ffn.hidden == 12
    assert cross_entropy(small, batches[0]) < cross_entropy(model, batches[0]) + 0.02
