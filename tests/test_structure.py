"""Pruning and structure: exchanged masks, gates, and models that become smaller."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.gates import top_inputs
from jaxllm.core.metrics import diagonal
from jaxllm.core.patterns import Pattern, parse_pattern
from jaxllm.core.regrow import regrow
from jaxllm.core.solvers import nearest
from jaxllm.core.stats import Stats
from jaxllm.core.weights import Gated

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
    assert ((gated.gate(x) != 0).sum(-1) == 5).all()
    np.testing.assert_allclose(gated.dot(x), gated.gate(x) @ w, atol=1e-5)
