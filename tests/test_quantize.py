"""What the solvers, sets and formats of weight-only quantization promise."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.additive import additive, beam_codes, decoded, error, fitted_tables
from jaxllm.core.codebooks import Centroids, DigitPlanes
from jaxllm.core.compensation import compensated
from jaxllm.core.descent import coordinates
from jaxllm.core.exempt import exempting
from jaxllm.core.formats import (
    Integer,
    balanced,
    bipolar,
    extended_float,
    float_format,
    power_levels,
    searched_float,
    shifts,
)
from jaxllm.core.incoherence import incoherent, lattice
from jaxllm.core.lattice import nearest_code, points, shortest
from jaxllm.core.metrics import Metric, asymmetric, gram, identity, pivots
from jaxllm.core.mixtures import AcrossOutputs, mixed_blocks, ranked_blocks, spread
from jaxllm.core.packing import pack_trits, unpack_trits
from jaxllm.core.scales import (
    Grid,
    absmax,
    absmean,
    best_table,
    least_squares,
    microscale,
    mse,
    power_of_two,
)
from jaxllm.core.solvers import nearest, obs
from jaxllm.core.splits import outliers, sensitive
from jaxllm.core.stacks import signed_stack
from jaxllm.core.stats import Drift, Samples, Stats
from jaxllm.core.vectors import vectors

ROWS, OUT = 48, 20


@pytest.fixture(scope="module")
def layer():
    """A weight, correlated inputs, and the drifted inputs of a compressed prefix."""
    keys = jax.random.split(jax.random.key(0), 4)
    w = jax.random.normal(keys[0], (ROWS, OUT))
    mix = jax.random.normal(keys[1], (ROWS, ROWS)) * jnp.exp(jnp.linspace(-2, 1, ROWS))
    exact = jax.random.normal(keys[2], (512, ROWS)) @ mix
    x = exact + 0.3 * jax.random.normal(keys[3], (512, ROWS)) @ mix
    return w, x, exact


def statistics(x, exact=None):
    found = Stats.of(("gram", "moments"), x)
    if exact is None:
        return found
    ones = jnp.ones(len(x))
    drift = Drift.between(Samples(x, ones), Samples(exact, ones))
    return Stats({**found.items, "drift": drift})


def loss(w, made, x, goal=None) -> float:
    wanted = (x if goal is None else goal) @ w
    return float(jnp.sum((x @ weights.materialize(made) - wanted) ** 2))


def plain_error(w, made) -> float:
    return float(jnp.sum((w - weights.materialize(made)) ** 2))


def numpy_gptaq(w, h, d, bits: int, damping: float):
    """The authors' loop in float64, one column at a time; ``w`` is [out, in]."""
    import ml_dtypes

    w, h, d = (np.float64(x) for x in (w, h, d))
    h[np.diag_indices(len(h))] += damping * np.mean(np.diag(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    p = np.triu(d @ u.T, 1) @ u
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
    q = np.zeros_like(w)
    for i in range(len(h)):
        code = np.clip(np.round(w[:, i] / scale + zero), 0, 2**bits - 1)
        q[:, i] = (code - zero) * scale
        here, error = w[:, i].copy(), (w[:, i] - q[:, i]) / u[i, i]
        w[:, i + 1 :] += np.outer(here, p[i, i + 1 :])
        w[:, i + 1 :] -= np.outer(error, u[i, i + 1 :])
    return q


def test_gptaq_equals_an_independent_transcription(layer):
    w, x, exact = layer
    stats = statistics(x, exact)
    made = obs(Grid(Integer(4)), asymmetric(gram(0.01), 0.25))(w, stats)
    drift = 0.25 * stats.drift.mean
    expected = numpy_gptaq(w.T, stats.gram.mean, drift, 4, 0.01).T
    wrong = jnp.abs(weights.materialize(made) - expected) > 1e-3
    assert wrong.mean() < 0.02  # ties of rounding may fall either way


def test_mending_the_drift_comes_closer_to_the_dense_outputs(layer):
    w, x, exact = layer
    stats, grid = statistics(x, exact), Grid(Integer(4), 16)
    mended = obs(grid, asymmetric(gram(0.01), 1.0))(w, stats)
    assert loss(w, mended, x, exact) < 0.99 * loss(w, obs(grid)(w, stats), x, exact)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_coordinate_descent_ends_below_the_sweep(bits, layer):
    """QuantEase's claim on one layer, with the same grid and the same bytes."""
    w, x, _ = layer
    stats, grid = statistics(x), Grid(Integer(bits))
    found, swept = coordinates(grid)(w, stats), obs(grid)(w, stats)
    assert weights.nbytes(found) == weights.nbytes(swept)
    assert loss(w, found, x) < loss(w, swept, x)
    sparse = coordinates(grid, outliers=0.05)(w, stats)
    assert loss(w, sparse, x) < 0.8 * loss(w, found, x)
    assert sparse.terms[1].values.size == int(0.05 * w.size)


def test_coordinate_descent_keeps_a_support(layer):
    w, x, _ = layer
    support = jnp.arange(ROWS)[:, None] % 2 == jnp.arange(OUT)[None] % 2
    made = coordinates(Grid(Integer(4), 16))(w, statistics(x), None, support)
    assert not jnp.where(support, 0, weights.materialize(made)).any()


def test_exempt_weights_are_exact_and_the_rest_is_on_the_grid(layer):
    w, x, _ = layer
    grid, split = Grid(Integer(3), 16), outliers(0.1, identity(), "float32")
    made = exempting(grid, split, identity(), compensate=False)(w, statistics(x))
    free = jnp.abs(w) >= jnp.sort(jnp.abs(w).ravel())[-int(0.1 * w.size)]
    error = jnp.abs(weights.materialize(made) - w)
    assert jnp.where(free, error, 0).max() < 1e-6
    assert plain_error(w, made) < 0.7 * plain_error(w, nearest(grid)(w, None))
    swept = exempting(grid, split, gram())(w, statistics(x))
    assert loss(w, swept, x) < 0.95 * loss(w, made, x)


@pytest.mark.parametrize(
    ("shape", "share", "kind"),
    [
        ((256, 192), 0.01, weights.Scattered),
        ((1024, 768), 0.01, weights.Segmented),
        ((1024, 768), 0.2, weights.Sparse),
    ],
)
def test_few_entries_take_the_form_that_is_small_or_has_a_kernel(shape, share, kind):
    w = jax.random.normal(jax.random.key(7), shape, jnp.bfloat16)
    made = outliers(share, identity())(w, None)
    assert isinstance(made, kind)
    size = jnp.abs(w)
    least = jnp.sort(size.ravel())[-int(share * w.size)]
    dense = made.materialize()
    np.testing.assert_array_equal(dense, jnp.where(dense == 0, 0, w))
    assert (dense != 0).sum() == int(share * w.size)
    assert jnp.where(dense == 0, size, 0).max() <= least
    planned = jax.eval_shape(lambda w: outliers(share, identity())(w, None), w)
    assert weights.nbytes(planned) == weights.nbytes(made) < 0.4 * w.nbytes


@pytest.mark.parametrize("share", (0.0045, 0.01))  # SqueezeLLM's, SpQR's
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 28672), (14336, 4096)])
def test_outliers_of_an_8b_model_have_a_kernel(shape, share):
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    made = jax.eval_shape(lambda w: outliers(share, identity())(w, None), w)
    assert isinstance(made, weights.Segmented)
    listed = weights.Scattered.size(shape, int(share * w.size), 2)
    assert weights.nbytes(made) < 1.55 * listed


def test_the_most_sensitive_weight_is_the_one_that_stretches_its_group():
    """One outlier per group: leaving it out helps the others, so it is chosen."""
    w = jax.random.uniform(jax.random.key(1), (32, 4), minval=-1.0, maxval=1.0)
    w = w.at[5, 0].set(9.0).at[20, 2].set(-7.0)
    ones = lambda stats, count: Metric(jnp.ones(count))  # noqa: E731
    kept = sensitive(2 / w.size, Grid(Integer(3), 16), ones)(w, None)
    places = np.argwhere(np.asarray(kept.materialize())).tolist()
    assert places == [[5, 0], [20, 2]]


def test_pivots_are_the_inverse_of_the_inverses_diagonal(layer):
    _, x, _ = layer
    stats = statistics(x)
    h = np.float64(gram(0.01)(stats, ROWS).full())
    expected = 1 / np.diag(np.linalg.inv(h))
    np.testing.assert_allclose(pivots()(stats, ROWS).importance, expected, rtol=2e-3)
    expected = [1 / np.linalg.inv(h[i:, i:])[0, 0] for i in range(ROWS)]
    found = pivots(later=True)(stats, ROWS).importance
    np.testing.assert_allclose(found, expected, rtol=2e-3)


@pytest.mark.parametrize("digits", ((-1.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 1.0)))
def test_alternating_least_squares_improves_on_the_greedy_start(digits, layer):
    w = layer[0]
    errors = [
        plain_error(w, nearest(DigitPlanes(2, digits, 16, steps=s))(w, None))
        for s in (0, 1, 20)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_a_shift_serves_weights_that_are_not_centred():
    """LUT-GEMM, section 3.1: the offset z of a group is fitted with its scales."""
    w = jax.random.normal(jax.random.key(2), (64, 3)) + 2.0
    plain, shifted = (
        nearest(DigitPlanes(2, block=32, shift=s))(w, None) for s in (False, True)
    )
    assert plain_error(w, shifted) < 0.7 * plain_error(w, plain)


def test_powers_of_two_are_stored_in_a_byte(layer):
    w = layer[0]
    made = nearest(DigitPlanes(3, block=16, powers=1))(w, None)
    power = jnp.log2(made.alpha.astype(jnp.float32))
    np.testing.assert_array_equal(power, jnp.round(power))
    assert made.alpha.dtype.itemsize == 1


def test_sums_of_powers_of_two(layer):
    """Three signed powers stay three when they are stored, and are nearer than one."""
    w = layer[0]
    made = [nearest(DigitPlanes(3, block=16, powers=p))(w, None) for p in (1, 2, 3)]
    errors = [plain_error(w, m) for m in made]
    assert errors[2] < errors[1] < errors[0]
    for count, one in zip((2, 3), made[1:], strict=True):
        rest = np.asarray(one.alpha, np.float32)
        assert one.alpha.dtype.itemsize == 2
        for _ in range(count):
            size = np.maximum(np.abs(rest), 1e-30)
            rest = rest - np.sign(rest) * 2.0 ** np.round(np.log2(size))
        assert not rest.any()


@pytest.mark.parametrize("count", (1, 5, 7, 16))
def test_five_trits_share_a_byte(count):
    codes = np.random.default_rng(0).integers(0, 3, (4, count)).astype(np.uint8)
    packed = pack_trits(jnp.asarray(codes))
    assert packed.shape == (4, -(-count // 5))
    np.testing.assert_array_equal(unpack_trits(packed, count), codes)


def test_centroids_go_where_the_importance_is(layer):
    """Weighted k-means has the least weighted error, plain k-means the least plain."""
    w = layer[0]
    cost = jnp.exp(2 * jax.random.normal(jax.random.key(3), w.shape))
    weigh = lambda stats, count: Metric(cost)  # noqa: E731
    ours, plain = (nearest(Centroids(3), m)(w, None) for m in (weigh, identity()))
    weighted = lambda made: float((cost * (w - made.materialize()) ** 2).sum())  # noqa: E731
    assert weighted(ours) < 0.8 * weighted(plain)
    assert plain_error(w, plain) < plain_error(w, ours)
    assert plain_error(w, plain) < plain_error(w, nearest(Grid(Integer(3)))(w, None))


def test_groups_across_outputs_isolate_a_strong_input(layer):
    """AdaDim, section 3: a large input row no longer widens its neighbours' range."""
    w = layer[0].at[7].multiply(30.0)
    grid = Grid(Integer(3), 10)
    across, along = nearest(AcrossOutputs(grid))(w, None), nearest(grid)(w, None)
    rest = jnp.arange(ROWS) != 7
    error = lambda made: float(((w - made.materialize())[rest] ** 2).sum())  # noqa: E731
    assert error(across) < 0.2 * error(along)
    x = layer[1]
    swept = obs(AcrossOutputs(grid))(w, statistics(x))
    assert loss(w, swept, x) < loss(w, across, x)


def test_mixed_blocks_keep_the_mean_bits_and_give_more_to_the_salient(layer):
    w, x, _ = layer
    stats = statistics(x)
    made = mixed_blocks(2, 8, 0.34, mse())(w, stats)
    bits = [p.format.bits for p in made.parts]
    assert bits == [3, 2, 1] and made.parts[0].shape == made.parts[2].shape
    even = mixed_blocks(2, 8, 0.0, mse())(w, stats)
    assert loss(w, made, x) < loss(w, even, x)
    assert weights.nbytes(made) <= weights.nbytes(even)


@pytest.mark.parametrize("across", (False, True))
@pytest.mark.parametrize("length", (2, 3))  # of which the sizes are no multiples
def test_compensated_vectors_beat_plain_assignment(length, across, layer):
    w, x, _ = layer
    made = functools.partial(vectors, length, 4, across=across)
    plain, swept, twice = (
        solve(w, statistics(x))
        for solve in (made(compensate=False), made(), made(stages=2))
    )
    assert weights.nbytes(plain) == weights.nbytes(swept)
    assert loss(w, twice, x) < loss(w, swept, x) < loss(w, plain, x)


def test_vectors_of_outputs_share_an_inputs_error(layer):
    """VPTQ: the values of neighbouring outputs of an input are one entry."""
    w, x, _ = layer
    made = vectors(2, 3, across=True)(w, statistics(x))
    pairs = np.asarray(made.materialize()).reshape(-1, 2)
    assert len(np.unique(pairs, axis=0)) <= 8


def test_the_grid_of_scales_begins_at_the_least():
    """Scales near each other lie far from zero, which their grid must not contain."""
    scales = jnp.linspace(0.5, 1.0, 256).reshape(16, 16)
    made = Grid(Integer(3), scale_format=Integer(3))._double(scales, Integer(3))
    error = jnp.abs(made.materialize().ravel() - scales.ravel())
    assert error.max() < 0.6 * 0.5 / 7
    equal = Grid(Integer(3))._double(jnp.full((5, 3), 0.3), Integer(3))
    np.testing.assert_allclose(equal.materialize(), 0.3, rtol=5e-3)
    short = dataclasses.replace(Grid(Integer(3)), scale_block=100)
    error = jnp.abs(
        short._double(scales, Integer(3)).materialize() - scales.ravel()[:, None]
    )
    assert error.max() < 0.6 * 0.5 / 7  # the last block is short


def test_powers_of_two_are_exact():
    """log2 of a power of two is no integer everywhere: exponents are read."""
    power = 2.0 ** np.arange(-20, 21)
    block = jnp.asarray(power, jnp.float32)[None] * 7
    scale, _ = power_of_two(absmax())(block, Integer(4, True), jnp.ones(1))
    np.testing.assert_array_equal(scale, power)
    above, _ = power_of_two(absmax())(1.001 * block, Integer(4, True), jnp.ones(1))
    np.testing.assert_array_equal(above, 2 * power)
    found, _ = microscale()(block / 7, float_format(2, 1), jnp.ones(1))
    np.testing.assert_array_equal(found, power / 4)


def test_scales_are_rounded_along_groups_or_across_outputs():
    """Groups of an input differ a thousandfold: only outputs may share a scale."""
    w = jax.random.normal(jax.random.key(0), (64, 48))
    w = w * jnp.repeat(jnp.logspace(-3, 0, 4), 16)[:, None]
    grid = Grid(Integer(4), 16, scale_format=Integer(3), scale_block=16)
    along, across = (
        nearest(dataclasses.replace(grid, scale_across=flag))(w, None)
        for flag in (False, True)
    )
    assert across.scale.shape == (48, 4) and across.scale.block == 16
    small = lambda made: ((w - made.materialize())[:16] ** 2).sum()  # noqa: E731
    assert small(across) < 0.2 * small(along)
    assert plain_error(w, across) < 1.1 * plain_error(w, along)


def test_each_block_of_a_stack_lowers_the_error(layer):
    w, x, _ = layer
    made = signed_stack(4, 2)(w, statistics(x))
    parts = [weights.Sum(made.terms[: k + 1]) for k in range(4)]
    errors = [plain_error(w, part) for part in parts]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.3 * errors[0]


def test_a_choice_is_at_least_as_good_as_each_of_its_tables(layer):
    w = layer[0]
    for choice in (extended_float(3), searched_float(4)):
        ours = plain_error(w, nearest(Grid(choice, 16, best_table()))(w, None))
        for table in choice.tables:
            assert ours <= plain_error(w, nearest(Grid(table, 16))(w, None)) * 1.0001


def test_least_squares_scales_are_better_than_their_start(layer):
    w = layer[0]
    for rule in (absmax(), absmean()):
        grid = lambda r: Grid(Integer(1, True), 16, r)  # noqa: E731
        fitted = nearest(grid(least_squares(rule)))(w, None)
        assert plain_error(w, fitted) < plain_error(w, nearest(grid(rule))(w, None))


def test_tables_are_those_of_the_papers():
    assert bipolar(2).levels == (-3, -1, 1, 3)
    assert balanced(2).levels == (-2, -1, 0, 1, 2) and balanced(2).middle == 2
    assert shifts(3).levels == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    assert extended_float(3).tables[2].levels == (-4, -2, -1, 0, 1, 2, 4, 6)
    assert power_levels(3, 0.5).levels[-2] == pytest.approx(4 / 9)


def test_compensated_weights_are_stored_as_they_were_learned(layer):
    """Soft and stored agree for any theta; both parts of theta have gradients."""
    w = layer[0]
    learned = compensated(balanced(2), 16, 1).call
    theta = learned.start(w, None, None)
    step = jax.random.normal(jax.random.key(3), theta["b"].shape) / 4
    for moved in (theta, theta | dict(b=step)):
        stored = learned.render(moved, w).materialize()
        np.testing.assert_allclose(learned.soft(moved, w), stored, atol=1e-6)
    assert plain_error(w + step, stored) < 0.8 * plain_error(w, stored)
    loss = lambda t: jnp.sum((learned.soft(t, w) - w) ** 2)  # noqa: E731
    slopes = jax.grad(loss)(theta)
    assert jnp.abs(slopes["gamma"]).min() > 0 and jnp.abs(slopes["b"]).min() > 0


def test_microscaling_shares_a_power_of_two_in_a_byte():
    """OCP MX 1.0: the scale of a block with largest magnitude 5 is 2^(2 - 2)."""
    w = jnp.linspace(-5, 5, 32)[:, None]
    grid = methods.find("microscaling")("mxfp4").call.solve.target
    assert grid.rule == microscale()
    made = nearest(grid)(w, None)
    assert made.scale.dtype == jnp.float8_e8m0fnu
    assert float(made.scale[0, 0]) == 1.0
    assert weights.nbytes(made) == 16 + 1


def test_lossless_weights_are_exact_and_smaller(builtin):
    """DFloat11: bit-equal logits, below 12 bits where bfloat16 takes 16."""
    small = methods.parse("dfloat11()")(builtin)
    tokens = jnp.arange(24, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(small(tokens), builtin(tokens))
    size = sum(
        weights.nbytes(small.params["layers"]["0"]["mlp"][n]) for n in ("up", "down")
    )
    dense = sum(
        builtin.params["layers"]["0"]["mlp"][n]["weight"].size for n in ("up", "down")
    )
    assert size * 8 / dense < 12


def test_lossless_refuses_what_is_no_bfloat16(builtin):
    third = jax.tree.map(lambda x: x / 3, builtin.params)
    with pytest.raises(ValueError, match=r"layers\.0.*no bfloat16"):
        methods.parse("dfloat11()")(builtin.replace(params=third))


@pytest.mark.parametrize(
    "text, needle",
    (
        ("bcq(5)", "planes"),
        ("adadim(dimension='both')", "accepted"),
        ("microscaling('mx9')", "accepted"),
        ("slim_llm(share=0.7)", "share"),
        ("nupes(exponents=(0.0, 1.0))", "exponent"),
        ("bitmod(5)", "accepted: 3, 4"),
        ("vptq(bits=9)", "bits 9"),
        ("pb_llm(by='luck')", "accepted"),
        ("gptaq(share=2)", "share"),
        ("finequant(alpha=0)", "alpha"),
    ),
)
def test_wrong_arguments_are_refused(text, needle):
    with pytest.raises((TypeError, ValueError), match=needle):
        methods.parse(text)


def test_e8p_is_the_shifted_lattice_and_its_search_is_exact():
    """2^16 distinct points of E8 + 1/4; the nearest one as by looking at them all."""
    every = np.asarray(points(jnp.arange(2**16, dtype=jnp.uint16)))
    assert len(np.unique(every, axis=0)) == 2**16
    moved = every - 0.25
    whole = (moved == np.round(moved)).all(1)
    half = (moved - 0.5 == np.round(moved - 0.5)).all(1)
    assert (whole | half).all() and (moved.sum(1) % 2 == 0).all()
    assert whole.sum() == half.sum() == 2**15
    x = np.array(1.2 * jax.random.normal(jax.random.key(0), (50, 8)))
    for table, bits in ((every, 16), (shortest(), 8)):
        found = np.asarray(points(nearest_code(jnp.asarray(x), bits)))
        far = ((x[:, None] - table[None]) ** 2).sum(-1).min(1)
        np.testing.assert_allclose(((x - found) ** 2).sum(1), far, atol=1e-5)
    np.testing.assert_array_equal(
        nearest_code(jnp.asarray(every), 16), np.arange(2**16)
    )


def test_e8p_rounds_gaussian_numbers_as_well_as_its_paper_says():
    """An error of 0.089 per number (QuIP#, figure 3); two bits each give 0.119."""
    x = jax.random.normal(jax.random.key(1), (4000, 8))
    error = (x - points(nearest_code(1.03 * x)) / 1.03) ** 2
    assert 0.086 < float(error.mean()) < 0.092


def test_each_stage_of_the_lattice_halves_the_error(layer):
    w, x, _ = layer
    stats = statistics(x)
    made = [lattice(bits)(w, stats) for bits in (2, 3, 4)]
    losses = [loss(w, m, x) for m in made]
    assert losses[1] < 0.5 * losses[0] and losses[2] < 0.4 * losses[1]
    sizes = [weights.nbytes(m) - 4 * len(m.codes) for m in made]
    assert sizes == [ROWS * OUT * bits // 8 for bits in (2, 3, 4)]


def test_vectors_are_rounded_where_the_former_errors_put_them(layer):
    """LDLQ by its definition: nearest to the best value given all earlier vectors."""
    w, x, _ = layer
    stats = statistics(x)
    made = lattice(2)(w, stats)
    h = np.float64(gram()(stats, ROWS).full())
    error = np.float64(made.materialize()) - np.float64(w)
    for low in range(0, ROWS, 8):
        pull = np.linalg.solve(h[low:, low:], h[low:, :low] @ error[:low])[:8]
        wanted = np.float64(w)[low : low + 8] - pull
        scaled = jnp.asarray((wanted / float(made.scale[0])).T, jnp.float32)
        codes = np.asarray(nearest_code(scaled))
        assert (codes == np.asarray(made.codes[0])[:, low // 8]).mean() > 0.9


def test_incoherence_flattens_what_stands_out(layer):
    """The outer transforms undo each other exactly; the largest entry comes down."""
    w, x, _ = layer
    spiked = w.at[3, 5].set(40.0)
    stats, seen = Stats.of(("gram",), x), {}

    def keep(inside, stats, key):
        seen["w"], seen["stats"] = inside, stats
        return inside

    made = incoherent(keep)(spiked, stats, jax.random.key(3))
    np.testing.assert_allclose(made.materialize(), spiked, atol=1e-4)
    peak = lambda a: float(jnp.abs(a).max() / jnp.sqrt((a**2).mean()))  # noqa: E731
    assert peak(seen["w"]) < 0.5 * peak(spiked)
    turned = (seen["w"] * (seen["stats"].gram.mean @ seen["w"])).sum()
    plain = (spiked * (stats.gram.mean @ spiked)).sum()
    np.testing.assert_allclose(turned, plain, rtol=1e-3)


def small_additive():
    """Four inputs in two vectors, two codebooks of three entries, five outputs."""
    keys = jax.random.split(jax.random.key(7), 4)
    w = jax.random.normal(keys[0], (4, 5))
    half = jax.random.normal(keys[1], (4, 4))
    tables = jax.random.normal(keys[2], (2, 3, 2))
    codes = jax.random.randint(keys[3], (2, 5, 2), 0, 3)
    return w, half @ half.T + 0.1 * jnp.eye(4), tables, codes


def test_a_wide_beam_finds_the_best_codes_of_all():
    """27 beams see all 81 sums; a single one is never worse than where it starts."""
    w, h, tables, codes = small_additive()
    one = jnp.ones(5)
    found = beam_codes(w, h, tables, codes, 27)
    every = [
        jnp.array(c).reshape(2, 1, 2) for c in itertools.product(range(3), repeat=4)
    ]
    sums = jnp.stack([decoded(tables, c) for c in every])  # [81, in, 1]
    left = w[None] - sums
    best = jnp.einsum("cio,ij,cjo->co", left, h, left).min(0)
    off = w - decoded(tables, found)
    np.testing.assert_allclose((off * (h @ off)).sum(0), best, rtol=1e-4)
    greedy = beam_codes(w, h, tables, codes, 1)
    assert error(w, h, one, tables, greedy) <= error(w, h, one, tables, codes)
    assert error(w, h, one, tables, found) <= error(w, h, one, tables, greedy)


def test_fitted_codebooks_are_the_least_squares_solution():
    w, h, tables, codes = small_additive()
    scale = jnp.linspace(0.5, 2.0, 5)
    found = fitted_tables(w, h, scale, tables, codes, 50)
    root = np.linalg.cholesky(np.float64(h)).T
    basis = np.eye(tables.size).reshape(-1, *tables.shape)
    columns = [
        (root @ np.float64(decoded(jnp.asarray(b, jnp.float32), codes) * scale)).ravel()
        for b in basis
    ]
    goal = (root @ np.float64(w)).ravel()
    least = np.linalg.lstsq(np.stack(columns, 1), goal, rcond=None)[1]
    exact = least[0] if least.size else 0.0
    solved = np.linalg.lstsq(np.stack(columns, 1), goal, rcond=None)[0]
    exact = max(exact, ((np.stack(columns, 1) @ solved - goal) ** 2).sum())
    np.testing.assert_allclose(error(w, h, scale, found, codes), exact, rtol=1e-3)


def test_additive_codebooks_beat_compensated_vectors_of_the_same_size(layer):
    w, x, _ = layer
    stats = statistics(x)
    losses = [
        loss(w, additive(4, 3, 2, rounds=rounds, beams=4)(w, stats), x)
        for rounds in (0, 3)
    ]
    plain = vectors(4, 3, 2)(w, stats)
    assert losses[1] < losses[0] and losses[1] < loss(w, plain, x)
    made = additive(4, 3, 2, rounds=0)(w, stats)
    assert weights.nbytes(made) == weights.nbytes(plain) + 2 * OUT


def test_wide_blocks_get_four_bits_and_only_the_others_keep_outliers(layer):
    w, x, _ = layer
    wide = w.at[8:16].mul(6.0).at[20, 3].set(9.0)
    kinds = ((4, 0.17), (2, 0.83))
    made = ranked_blocks(kinds, 8, absmax(), gram(), identity(), spread(), 0.01)(
        wide, statistics(x)
    )
    main, apart = made.terms
    assert main.order[0] == 1 and [p.format.bits for p in main.parts] == [4, 2]
    kept = weights.materialize(apart) != 0
    assert kept.sum() <= int(0.01 * w.size) and bool(kept[20, 3])
    assert not kept[8:16].any()
    np.testing.assert_allclose(
        weights.materialize(made)[20, 3], 9.0, atol=0.2
    )  # free: it may take over earlier errors
