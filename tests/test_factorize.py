"""Factorizations and the order of removal, against what they promise."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.metrics import absolute
from jaxllm.core.model import weight
from jaxllm.core.ranks import ranks_under, spectrum
from jaxllm.core.removal import removal_order
from jaxllm.core.solvers import svd
from jaxllm.core.stats import Stats
from jaxllm.core.tensors import digits, low_rank_plus_sparse, tensor_train, train
from jaxllm.core.weights import MPO
from jaxllm.models import MLP, Attention, Layer, Transformer, init

ROWS, OUT = 24, 20


@pytest.fixture(scope="module")
def w():
    return jax.random.normal(jax.random.key(0), (ROWS, OUT))


@pytest.mark.parametrize("sites", (2, 3, 4))
def test_a_full_bond_is_exact(sites, w):
    shape = digits(ROWS, sites), digits(OUT, sites)
    made = MPO(tuple(train(w, shape, 10_000)))
    assert made.shape == w.shape
    np.testing.assert_allclose(made.materialize(), w, atol=1e-5)


def test_two_cores_are_the_best_of_their_bond(w):
    """The error is the tail of the spectrum of the matrix [i1 o1, i2 o2]."""
    made = tensor_train(0.5)(w, None)
    (a, b), (c, d) = digits(ROWS, 2), digits(OUT, 2)
    turned = np.float64(w).reshape(a, b, c, d).transpose(0, 2, 1, 3)
    s = np.linalg.svd(turned.reshape(a * c, b * d), compute_uv=False)
    (bond,) = made.bonds
    error = float(jnp.linalg.norm(made.materialize() - w))
    np.testing.assert_allclose(error, np.linalg.norm(s[bond:]), rtol=1e-4)
    size = sum(core.size for core in made.cores)
    assert size <= 0.5 * w.size < size + a * c + b * d  # one more would not fit


def test_a_sparse_part_takes_what_no_product_can(w):
    """Spikes on a low-rank matrix: at equal bytes the sum is far better."""
    spikes = jnp.where(jax.random.uniform(jax.random.key(1), w.shape) < 0.02, 8.0, 0.0)
    flat = jax.random.normal(jax.random.key(2), (ROWS, 2)) @ w[:2]
    target = flat + spikes
    error = lambda m: float(jnp.linalg.norm(m.materialize() - target))  # noqa: E731
    plain = svd(ratio=0.6)(target, None)
    both = low_rank_plus_sparse(0.6, 0.04, "largest")(target, None)
    assert weights.nbytes(both) <= weights.nbytes(plain)
    assert error(both) < 0.3 * error(plain)


def test_a_random_support_is_exact_on_itself_and_the_same_for_a_key(w):
    key = jax.random.key(3)
    made = low_rank_plus_sparse(0.6, 0.05)(w, None, key)
    product, sparse = made.terms
    where = sparse.materialize() != 0
    np.testing.assert_allclose(made.materialize()[where], w[where], atol=1e-5)
    again = low_rank_plus_sparse(0.6, 0.05)(w + 1.0, None, key).terms[1]
    np.testing.assert_array_equal(again.materialize() != 0, where)
    assert weights.nbytes(made) <= 0.6 * weights.nbytes(w) and product.rank >= 1


def test_asvd_is_optimal_for_its_scaling(w):
    x = jax.random.normal(jax.random.key(4), (200, ROWS)) * jnp.arange(1.0, ROWS + 1)
    stats = Stats.of(("moments",), x)
    made = svd(rank=4, metric=absolute(0.5))(w, stats)
    scale = np.sqrt(np.abs(np.float64(x)).mean(0))[:, None]
    tail = np.linalg.svd(scale * np.float64(w), compute_uv=False)[4:]
    error = np.linalg.norm(scale * np.float64(made.materialize() - w))
    np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=1e-3)


def test_one_threshold_serves_all_weights_and_meets_the_budget():
    keys = jax.random.split(jax.random.key(5), 4)
    decay = (0.3, 0.7, 0.9, 1.0)
    ws = [
        jax.random.normal(k, (16, 12)) * (d ** jnp.arange(12))[None]
        for k, d in zip(keys, decay, strict=True)
    ]
    spectra = [spectrum(w) for w in ws]
    ranks = ranks_under(spectra, [w.shape for w in ws], 0.6)
    size = sum(16 * 12 if r is None else r * 28 for r in ranks)
    assert size <= 0.6 * 4 * 16 * 12 and ranks[0] < ranks[1]
    cut = [(s, r) for s, r in zip(spectra, ranks, strict=True) if r is not None]
    assert len(cut) >= 2
    assert min(s[r - 1] for s, r in cut) >= max(s[r] for s, r in cut)


def test_units_go_in_the_order_of_the_least_refitted_error():
    """The first costs are those of brute force: refit without each unit by itself."""
    keys = jax.random.split(jax.random.key(6), 3)
    mix = jax.random.normal(keys[0], (8, 8))
    h = mix @ mix.T + 0.1 * jnp.eye(8)
    w = jax.random.normal(keys[1], (8, 5))
    order, errors = removal_order(w, h, 4)

    def refitted(gone) -> float:
        at = [i for u in gone for i in (2 * u, 2 * u + 1)]
        kept = [i for i in range(8) if i not in at]
        full = np.float64(h)
        fix = np.linalg.solve(full[np.ix_(kept, kept)], full[np.ix_(kept, at)])
        delta = np.zeros((8, 5))
        delta[at] = -np.float64(w)[at]
        delta[kept] = fix @ np.float64(w)[at]
        return float((delta * (full @ delta)).sum())

    single = [refitted((u,)) for u in range(4)]
    assert int(order[0]) == int(np.argmin(single))
    gone = [int(u) for u in order]
    for i, found in enumerate(np.asarray(errors)):
        np.testing.assert_allclose(found, refitted(gone[: i + 1]), rtol=1e-3)
    pairs = [refitted(p) for p in itertools.combinations(range(4), 2)]
    assert errors[1] <= 1.5 * min(pairs)


def test_what_stays_dense_in_welore_is_untouched():
    layers = (Layer(Attention(4, 2, 8), MLP(32)),) * 2
    model = init(Transformer(64, 32, layers), jax.random.key(0))
    made = methods.parse("welore(0.9)")(model)
    paths = model.config.linears()
    dense = [p for p in paths if not weights.compressed(weight(made, p))]
    assert 0 < len(dense) < len(paths)
    for path in dense:
        np.testing.assert_array_equal(weight(made, path), weight(model, path))
    size = lambda m: sum(weights.nbytes(weight(m, p)) for p in paths)  # noqa: E731
    assert size(made) <= 0.9 * size(model)


@pytest.mark.parametrize(
    "text, needle",
    (
        ("compactifai(0.0)", "ratio"),
        ("compactifai(0.8, sites=1)", "sites"),
        ("sltrain(0.8, support='best')", "'random' or 'largest'"),
        ("welore(1.5)", "ratio"),
    ),
)
def test_wrong_arguments_are_refused(text, needle):
    with pytest.raises(ValueError, match=needle):
        methods.parse(text)
