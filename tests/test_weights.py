"""The laws of the weight types, for every type and nesting that methods make."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import weights
from jaxllm.core.codebooks import Centroids, DigitPlanes
from jaxllm.core.formats import (
    ActivationFormat,
    Integer,
    MixedActivation,
    balanced,
    float_format,
    normal_float,
    searched_float,
)
from jaxllm.core.hadamard import hadamard, hadamard_matrix, hadamard_transform
from jaxllm.core.incoherence import incoherent, lattice
from jaxllm.core.metrics import gram, identity
from jaxllm.core.mixtures import AcrossOutputs, mixed_blocks
from jaxllm.core.ordering import by_range
from jaxllm.core.packing import pack, packed_bytes, unpack
from jaxllm.core.patterns import Pattern
from jaxllm.core.reassembly import reassembled
from jaxllm.core.scales import Grid, absmax, best_table
from jaxllm.core.solvers import nearest, obs
from jaxllm.core.spec import expression
from jaxllm.core.splits import outliers
from jaxllm.core.stacks import signed_stack
from jaxllm.core.stats import Stats
from jaxllm.core.tensors import tensor_train
from jaxllm.core.two_level import dual_grained
from jaxllm.core.vectors import vectors
from jaxllm.core.weights import (
    ActivationQuantized,
    Clipped,
    EntropyCoded,
    Gated,
    Hadamard,
    Kronecker,
    LowRank,
    Orthogonal,
    OutputTransformed,
    Permutation,
    Reassembly,
    RowGroups,
    Scale,
    Segmented,
    StaticInput,
    Sum,
    Trainable,
    Transformed,
)

ROWS, OUT = 44, 24  # rows: no multiple of a group of 32 or of 8 codes
EIGHT = ActivationFormat(8)


def dense(seed: int = 0, shape=(ROWS, OUT)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(format, block=32, w=None, **more):
    return nearest(Grid(format, block, **more))(dense() if w is None else w, None)


def pruned(density=0.5, block=None, joint=False):
    return nearest(Pattern(density, block, joint))(dense(), None)


def gptq_on_zeros(sparse):
    grid = nearest(Grid(Integer(4), 8))
    solve = lambda w, stats, support: grid(w, stats, None, support)  # noqa: E731
    return sparse.refine(solve, None)


def split_and_merged() -> Reassembly:
    """Channel 0 in three parts; 1 and 2, 3 and 4 merged."""
    first = np.r_[0, 0, 0, 1, 3, 5:ROWS].astype(np.uint8)
    second = np.r_[0, 0, 0, 2, 4, 5:ROWS].astype(np.uint8)
    parts = np.ones(ROWS, np.uint8)
    parts[:3] = 3
    return Reassembly(*map(jnp.asarray, (first, second, parts)))


def static_input(w, block: int | None = None) -> StaticInput:
    """Ranges of 3.8 and more, one per block of inputs."""
    blocks = 1 if block is None else -(-ROWS // block)
    scale = jnp.linspace(0.03, 0.035, blocks)
    return StaticInput(w, scale, None, ActivationFormat(8, block=block))


TYPES = {
    **{f"int{b}": lambda b=b: rounded(Integer(b)) for b in range(1, 9)},
    **{f"sint{b}": lambda b=b: rounded(Integer(b, True)) for b in (1, 4, 8)},
    "per output": lambda: rounded(Integer(4), None),
    "nf4 double": lambda: rounded(normal_float(4), 16, scale_format=Integer(8)),
    "e2m1": lambda: rounded(float_format(2, 1), 16),
    "e4m3": lambda: rounded(float_format(4, 3), None),
    "2:4": lambda: pruned(0.5, 4),
    "per row": lambda: pruned(0.3),
    "one mask": lambda: pruned(0.4, 16, joint=True),
    "2:4 int4": lambda: gptq_on_zeros(pruned(0.5, 4)),
    "one mask int4": lambda: gptq_on_zeros(pruned(0.4, 16, joint=True)),
    "low rank": lambda: LowRank(dense(1, (ROWS, 3)), dense(2, (3, OUT)), gain=0.5),
    "sum": lambda: Sum((rounded(Integer(3)), pruned(0.1))),
    "adapter": lambda: Sum(
        (dense(), Trainable(LowRank(dense(1, (ROWS, 2)), dense(2, (2, OUT)))))
    ),
    "scaled": lambda: Transformed(Scale(jnp.exp(dense(3, (ROWS,)))), dense()),
    "hadamard": lambda: Transformed(Hadamard(), rounded(Integer(4))),
    "signed": lambda: Transformed(Hadamard(jnp.sign(dense(4, (ROWS,)))), dense()),
    "across heads": lambda: Transformed(Hadamard(group=11), dense()),
    "orthogonal": lambda: Transformed(
        Orthogonal(jnp.linalg.qr(dense(5, (ROWS, ROWS)))[0]), dense()
    ),
    "kronecker": lambda: Transformed(
        Kronecker(dense(5, (4, 4)), dense(6, (11, 11))), dense()
    ),
    "mixed heads": lambda: Transformed(Kronecker(dense(5, (4, 4))), dense()),
    "clipped, open": lambda: Clipped(dense(), jnp.ones(())),
    "permuted": lambda: Transformed(
        Permutation(jax.random.permutation(jax.random.key(6), ROWS)), dense()
    ),
    "mpo": lambda: tensor_train(0.6)(dense(), None),
    "gated, open": lambda: Gated(dense(), jnp.exp(dense(3, (ROWS,))), kept=ROWS),
    "listed outliers": lambda: outliers(0.02, identity(), "float32")(dense(), None),
    "outliers in segments": lambda: Segmented.of(dense(), dense() > 1.5, 90),
    "codebooks": lambda: nearest(Centroids(3, 16))(dense(), None),
    "binary planes": lambda: nearest(DigitPlanes(2, block=16, shift=True))(
        dense(), None
    ),
    "ternary planes": lambda: nearest(DigitPlanes(2, (-1.0, 0.0, 1.0)))(dense(), None),
    "vectors": lambda: vectors(3, 4, 2, identity(), 5, False)(dense(), None),
    "lattice": lambda: lattice(3, identity())(dense(), None),
    "turned on both sides": lambda: incoherent(lattice(2, identity()))(dense(), None),
    "signed magnitudes": lambda: signed_stack(1, 4, identity())(dense(), None).terms[0],
    "across outputs": lambda: nearest(AcrossOutputs(Grid(Integer(4), 8)))(
        dense(), None
    ),
    "mixed blocks": lambda: mixed_blocks(3, 16, 0.34, absmax(), identity(), identity())(
        dense(), None
    ),
    "entropy coded": lambda: EntropyCoded.of(dense().astype(jnp.bfloat16)),
    "choice of floats": lambda: rounded(searched_float(4), 16, rule=best_table()),
    "rounded zeros": lambda: rounded(
        Integer(3), 8, scale_format=Integer(3), scale_block=16, zero_format=Integer(3)
    ),
    "w4a8": lambda: ActivationQuantized(rounded(Integer(4)), ActivationFormat(8)),
    "w8a8": lambda: ActivationQuantized(
        rounded(Integer(8, True), None), ActivationFormat(8)
    ),
    "w4a8 in groups": lambda: ActivationQuantized(
        rounded(Integer(4, True), 16), ActivationFormat(8, block=16)
    ),
    "w4ax": lambda: ActivationQuantized(
        rounded(Integer(4, True), 16), MixedActivation(7, block=16, share=0.3)
    ),
    "w2a8 balanced": lambda: ActivationQuantized(
        rounded(balanced(2), None), ActivationFormat(8)
    ),
    "static w8a8": lambda: static_input(rounded(Integer(8, True), None)),
    "static w4a8 in groups": lambda: static_input(rounded(Integer(4, True), 16), 16),
    "static w4a8 two levels": lambda: static_input(TYPES["two levels"]()),
    "static with zeros": lambda: StaticInput(
        rounded(Integer(4)),
        jnp.full(1, 0.03),
        jnp.full(1, 120, jnp.uint8),
        ActivationFormat(8, symmetric=False),
    ),
    "reassembled": lambda: Transformed(split_and_merged(), dense()),
    "vectors of outputs": lambda: vectors(5, 4, 2, identity(), 5, False, True)(
        dense(), None
    ),
    "adapter beside w4a8": lambda: Sum(
        (
            TYPES["w4a8"](),
            Trainable(LowRank(dense(1, (ROWS, 2)), dense(2, (2, OUT)))),
        )
    ),
    "trained w4a8": lambda: Trainable(TYPES["w4a8"]()),
    "trained scales": lambda: Trainable(rounded(Integer(4)), ("scale",)),
    "w4a8 in groups of inputs": lambda: RowGroups(
        jnp.array([1, 2, 0], jnp.uint8),
        (
            ActivationQuantized(rounded(Integer(4), 16, dense(0, (16, OUT))), EIGHT),
            ActivationQuantized(rounded(Integer(5), 16, dense(1, (32, OUT))), EIGHT),
        ),
        16,
        ROWS,
    ),
    "w4a8 turned at the output": lambda: OutputTransformed(Hadamard(), TYPES["w4a8"]()),
    "two levels": lambda: dual_grained(4, 16, metric=identity())(dense(), None),
    "w4a8 two levels": lambda: ActivationQuantized(
        TYPES["two levels"](), ActivationFormat(8)
    ),
}
INTEGER_PRODUCTS = (
    "w8a8", "w4a8 in groups", "w4a8 two levels", "w4ax", "w2a8 balanced",
    "static w8a8", "static w4a8 in groups", "static w4a8 two levels",
)  # fmt: skip
ROUNDS_INPUT = {
    "w4a8", "adapter beside w4a8", "trained w4a8", "w4a8 in groups of inputs",
    "w4a8 turned at the output", "static with zeros", *INTEGER_PRODUCTS,
}  # fmt: skip


@pytest.fixture(params=TYPES, scope="module")
def named(request):
    return request.param, TYPES[request.param]()


def test_shape_and_dtype_are_those_of_the_dense_array(named):
    _, w = named
    made = w.materialize()
    assert made.shape == w.shape == (ROWS, OUT)
    assert made.dtype == jnp.dtype(w.dtype)
    assert weights.size(w) == ROWS * OUT


def test_dot_is_the_product_with_the_dense_array(named):
    name, w = named
    x = dense(7, (2, 5, ROWS))
    expected = x @ w.materialize()
    error = jnp.abs(w.dot(x) - expected).max() / jnp.abs(expected).max()
    assert error < (0.02 if name in ROUNDS_INPUT else 1e-5)


def test_jit_keeps_it(named):
    _, w = named
    x = dense(7, (5, ROWS))
    jitted = jax.jit(lambda w, x: weights.dot(x, w))(w, x)
    np.testing.assert_allclose(jitted, w.dot(x), rtol=1e-5, atol=1e-4)
    leaves, tree = jax.tree.flatten(w)
    again = tree.unflatten(leaves)
    np.testing.assert_array_equal(again.materialize(), w.materialize())


def test_leading_axes_work_under_vmap_and_serve_experts(named):
    _, w = named
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    other = jax.tree.map(lambda leaf: leaf * 1.25 if floating(leaf) else leaf, w)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, other)
    both = jax.vmap(weights.materialize)(stack)
    np.testing.assert_allclose(both[1], other.materialize(), atol=1e-5)
    x = dense(8, (6, ROWS))
    sizes = jnp.array([2, 4], jnp.int32)
    served = weights.dot(x, stack, group_sizes=sizes)
    expected = jnp.concatenate((weights.dot(x[:2], w), weights.dot(x[2:], other)))
    error = jnp.abs(served - expected).max() / jnp.abs(expected).max()
    assert error < 1e-4


@pytest.mark.parametrize("run", ("zeros", "first code"))
def test_long_runs_of_one_exponent_decode(run):
    """The first code is all zeros, and so is a window of nothing but it."""
    w = np.array(dense(0, (64, 32)).astype(jnp.bfloat16))
    w[8:56] = 0.0 if run == "zeros" else 0.7
    made = EntropyCoded.of(jnp.asarray(w))
    np.testing.assert_array_equal(made.materialize(), jnp.asarray(w))


@pytest.mark.parametrize("name", ("2:4 int4", "one mask int4"))
def test_codes_on_a_mask_are_not_compressed_again(name):
    with pytest.raises(TypeError, match="Sparse has no dense part left"):
        gptq_on_zeros(TYPES[name]())


def test_rows_are_the_columns_of_the_table(named):
    _, w = named
    ids = jnp.array([[3, 0, 1], [OUT - 1, 3, 2]])
    expected = jnp.moveaxis(w.materialize()[:, ids], 0, -1)
    np.testing.assert_allclose(weights.rows(w, ids), expected, atol=1e-5)


def test_every_leaf_has_named_axes(named):
    _, w = named

    def is_names(x):
        return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)

    names = jax.tree.leaves(w.axes(("embed", "mlp")), is_leaf=is_names)
    leaves = jax.tree.leaves(w)
    assert [len(n) for n in names] == [leaf.ndim for leaf in leaves]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", (1, 7, 8, 33))
def test_packing_is_exact_and_small(bits, count):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, count)).astype(np.uint8)
    planes = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(unpack(planes, bits, count), codes)
    assert sum(p.shape[-1] for p in planes) == packed_bytes(count, bits)
    assert packed_bytes(count, bits) <= count * bits / 8 + 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_stored_bytes_are_codes_scales_and_zeros(bits):
    w = rounded(Integer(bits), 32)
    groups = -(-ROWS // 32)
    assert weights.nbytes(w) == OUT * (packed_bytes(ROWS, bits) + groups * (2 + 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_to_the_nearest_point_of_the_stored_grid(bits):
    values = dense(9)
    w = rounded(Integer(bits), 32, values)
    scale = jnp.repeat(w.scale.astype(jnp.float32), 32, -1)[:, :ROWS].T
    error = jnp.abs(w.materialize() - values)
    assert (error <= scale * 0.5 + 0.02 * jnp.abs(values)).all()


@pytest.mark.parametrize("kind", ("2:4", "per row", "one mask"))
def test_a_sparse_weight_keeps_the_values_of_its_mask(kind):
    w = TYPES[kind]()
    made, support = w.materialize(), w.support
    np.testing.assert_array_equal(made, jnp.where(support, dense(), 0))
    if kind == "2:4":
        assert (support.reshape(-1, 4, OUT).sum(1) == 2).all()
    if kind == "per row":
        assert (support.sum(0) == round(0.3 * ROWS)).all()
    assert weights.nbytes(w) < 0.6 * weights.nbytes(dense())


@pytest.mark.parametrize("kind", ("2:4", "one mask"))
def test_quantizing_a_sparse_weight_keeps_its_zeros_and_shrinks_it(kind):
    sparse, small = TYPES[kind](), TYPES[f"{kind} int4"]()
    assert not jnp.where(sparse.support, 0, small.materialize()).any()
    kept = jnp.where(sparse.support, dense() - small.materialize(), 0)
    assert jnp.abs(kept).max() < 0.3
    assert weights.nbytes(small) < weights.nbytes(sparse) / 2


@pytest.mark.parametrize("kind", INTEGER_PRODUCTS)
def test_integer_product_is_exact(kind):
    """int8 x int8 -> int32 gives what the rounded factors give in float64."""
    w = TYPES[kind]()
    assert w.integer_product
    x = dense(10, (6, ROWS))
    exact = np.float64(w.before(x)) @ np.float64(w.materialize())
    np.testing.assert_allclose(w.dot(x), exact, rtol=2e-6, atol=2e-5)
    text = str(jax.make_jaxpr(w.dot)(x))
    assert "preferred_element_type=int32" in text


def test_two_levels_fit_into_int8_and_searching_them_pays():
    """Integers without overflow; the output error falls with either search."""
    x = dense(16, (64, ROWS)) * jnp.exp(dense(17, (ROWS,)))
    stats = Stats.of(("gram",), x)
    solve = lambda *steps: dual_grained(4, 16, *steps)(dense(), stats)  # noqa: E731
    loss = lambda w: (jnp.abs(x @ (w.materialize() - dense())) ** 2).sum(0)  # noqa: E731
    w = solve(20, 80)
    codes = np.int64(unpack(w.planes, 4, ROWS))
    wide = lambda v: np.int64(np.repeat(v, 16, 1)[:, :ROWS])  # noqa: E731
    exact = (codes - wide(w.zero)) * wide(w.group_scale)
    np.testing.assert_array_equal(w.integers(), exact)
    assert np.abs(exact).max() > 100
    assert (loss(w) <= loss(solve(20, 1)) * 1.00001).all()
    assert loss(w).sum() < 0.97 * loss(solve(1, 1)).sum()


@pytest.mark.parametrize("share, wide", ((0, 0), (0.01, 8), (0.5, 16), (1, 20)))
def test_the_first_blocks_of_mixed_activations_are_wide(share, wide):
    format = MixedActivation(3, block=8, wide=6, share=share)
    x = dense(19, (5, 20))
    assert format.channels(20) == wide
    parts = ((6, x[:, :wide]), (3, x[:, wide:]))
    each = [ActivationFormat(b, block=8).round(p) for b, p in parts if p.size]
    np.testing.assert_array_equal(format.round(x), jnp.concatenate(each, -1))
    with pytest.raises(TypeError, match="cannot be stored"):
        format.encode(x)


def test_sorted_inputs_carry_their_statistics_along():
    """Outliers come first; the sweep sees the Gram matrix of the new order."""
    x = dense(20, (99, ROWS)).at[:, 7].mul(50).at[:, 30].mul(20)
    stats = Stats.of(("gram", "absmax"), x)
    solve = obs(Grid(Integer(3), 16), gram())
    w = by_range(solve)(dense(), stats)
    assert list(w.op.order[:2]) == [7, 30]
    order = np.argsort(-np.abs(x).max(0), kind="stable")
    expected = solve(dense()[order], Stats.of(("gram",), x[:, order])).materialize()
    np.testing.assert_allclose(w.inner.materialize(), expected, atol=1e-5)


def test_reassembly_splits_outliers_and_keeps_what_it_can():
    """A split alone is exact; the pair merged for it is the most alike one."""
    x = dense(21, (200, 16)).at[:, 5].mul(3.0)
    w = dense(22, (16, 6))
    x, w = x.at[:, 9].set(x[:, 2] * 1.001), w.at[9].set(w[2] * 1.001)
    stats = Stats.of(("gram", "absmax"), x)
    exact = expression(lambda: lambda w, stats, key=None, support=None: w)()
    made = reassembled(exact, ActivationFormat(4), 0.1)(w, stats)
    first, second, parts = (np.asarray(v) for v in jax.tree.leaves(made.op))
    assert (parts[first == 5] == 2).all() and (first == 5).sum() == 2
    assert {(2, 9), (9, 2)} & {*zip(first, second, strict=True)}
    assert len(first) == 16 and (parts > 1).sum() == 2
    np.testing.assert_allclose(
        made.op.apply(x) @ made.inner.inner, x @ w, atol=1e-3 * jnp.abs(x @ w).max()
    )
    assert jnp.abs(made.op.apply(x)).max() < 0.7 * jnp.abs(x).max()


def test_a_short_last_block_of_activations_is_a_block_of_its_own():
    x = dense(18, (3, 20)).at[:, 16:].mul(0.01)
    format = ActivationFormat(4, block=8)
    for symmetric in (True, False):
        format = dataclasses.replace(format, symmetric=symmetric)
        parts = [format.round(x[:, i : i + 8]) for i in (0, 8, 16)]
        np.testing.assert_array_equal(format.round(x), jnp.concatenate(parts, -1))
    codes, scale = ActivationFormat(4, block=8).integers(x)
    back = codes * jnp.repeat(scale, 8, -1)[:, :20]
    np.testing.assert_allclose(back, ActivationFormat(4, block=8).round(x), rtol=1e-6)


@pytest.mark.parametrize("symmetric", (True, False))
def test_a_static_range_clips_and_its_gradients_are_those_of_its_ends(symmetric):
    """Within the range (round(u) - u) per token, beyond it the end (LSQ, eq. 3)."""
    format = ActivationFormat(4, symmetric, block=8)
    zero = None if symmetric else jnp.array([3.0, 5.0])
    scale, x = jnp.array([0.3, 0.5]), dense(23, (6, 16)) * 2
    low, high = (-8, 7) if symmetric else (-zero[:, None], 15 - zero[:, None])
    u = x.reshape(6, 2, 8) / scale[:, None]
    codes = jnp.clip(jnp.round(u), low, high)
    found = format.fixed(x, scale, zero)
    wanted = (codes * scale[:, None]).reshape(x.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    total = lambda scale, x: format.fixed(x, scale, zero).sum()  # noqa: E731
    to_scale, to_x = jax.grad(total, (0, 1))(scale, x)
    within = (u >= low) & (u <= high)
    slope = jnp.where(within, codes - u, codes)
    np.testing.assert_allclose(to_scale, slope.sum((0, 2)), rtol=1e-4)
    np.testing.assert_allclose(to_x, within.reshape(x.shape), atol=1e-6)
    assert 0.02 < 1 - within.mean() < 0.5


def test_a_type_without_a_dense_part_refuses():
    with pytest.raises(TypeError, match="Quantized has no dense part"):
        rounded(Integer(4)).refine(lambda w, stats, support: w, None)
    with pytest.raises(TypeError, match="LowRank has no dense part"):
        TYPES["low rank"]().refine(lambda w, stats, support: w, None)


def test_refine_reaches_the_open_part_through_every_shell():
    """Sum, transform and activation rounding pass the solver to what they hold."""
    seen = []

    def solve(w, stats, support):
        seen.append(w)
        return jnp.zeros_like(w)

    inner = Transformed(Scale(jnp.full(ROWS, 2.0)), dense())
    factors = LowRank(dense(1, (ROWS, 2)), dense(2, (2, OUT)))
    shell = ActivationQuantized(Sum((inner, factors)), ActivationFormat(8))
    x = dense(11, (9, ROWS))
    made = shell.refine(solve, Stats.of(("gram", "absmax", "moments"), x))
    np.testing.assert_array_equal(seen[0], dense())
    np.testing.assert_allclose(made.materialize(), shell.inner.terms[1].materialize())


@pytest.mark.parametrize("op", (Scale, Hadamard, Kronecker, Orthogonal, Permutation))
def test_inverse_undoes_an_op(op):
    made = {
        Scale: lambda: Scale(jnp.exp(dense(3, (ROWS,)))),
        Hadamard: lambda: Hadamard(jnp.sign(dense(4, (ROWS,)))),
        Kronecker: lambda: Kronecker(dense(5, (4, 4)), dense(6, (11, 11))),
        Orthogonal: lambda: Orthogonal(jnp.linalg.qr(dense(5, (ROWS, ROWS)))[0]),
        Permutation: lambda: Permutation(
            jax.random.permutation(jax.random.key(6), ROWS)
        ),
    }[op]()
    x = dense(12, (3, ROWS))
    np.testing.assert_allclose(made.inverse(made.apply(x)), x, atol=1e-5)


def test_a_kronecker_transform_is_the_product_with_the_matrix():
    """x (L (x) R), and (L (x) R) W for the rows of a weight; L alone mixes heads."""
    left, right = dense(5, (4, 4)), dense(6, (11, 11))
    for op, full in (
        (Kronecker(left, right), jnp.kron(left, right)),
        (Kronecker(left), jnp.kron(left, jnp.eye(11))),
    ):
        np.testing.assert_allclose(op.apply(dense(12, (3, ROWS))),
                                   dense(12, (3, ROWS)) @ full, atol=1e-4)  # fmt: skip
        np.testing.assert_allclose(op.rows(dense()), full @ dense(), atol=1e-4)


def test_clipping_then_rounding_shrinks_the_range():
    """Each token by its own peak; the codes then cover what is left."""
    x, share, format = dense(12, (5, ROWS)), 0.7, ActivationFormat(4)
    w = Clipped(ActivationQuantized(dense(), format), jnp.asarray(share))
    peak = np.abs(x).max(1, keepdims=True)
    inside = jnp.asarray(np.clip(x, -share * peak, share * peak))
    expected = format.round(inside) @ dense()
    np.testing.assert_allclose(w.dot(x), expected, rtol=1e-4, atol=1e-4)
    assert jnp.abs(w.dot(x) - w.inner.dot(x)).max() > 0.1


@pytest.mark.parametrize("width", (1, 2, 12, 20, 28, 52, 64, 148, 172, 688, 640))
def test_hadamard_matrices_are_orthogonal_and_the_transform_is_the_matrix(width):
    matrix = hadamard_matrix(width)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-4)
    x = dense(13, (2, width))
    np.testing.assert_allclose(hadamard_transform(x), x @ matrix, atol=1e-4)


def test_hadamard_172_is_of_williamson_type():
    h = hadamard(172).astype(int)
    assert set(np.unique(h)) == {-1, 1}
    np.testing.assert_array_equal(h @ h.T, 172 * np.eye(172))


def test_hadamard_falls_back_to_the_largest_dividing_block():
    matrix = hadamard_matrix(92)  # no construction here: 23 blocks of 4
    assert (matrix != 0).sum() == 92 * 4


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("block", (None, 8))
def test_stored_activations_are_the_rounded_ones(bits, symmetric, block):
    format = ActivationFormat(bits, symmetric, block)
    x = dense(14, (2, 3, 5, 16))
    packed = format.encode(x)
    np.testing.assert_allclose(format.decode(packed), format.round(x), atol=1e-6)
    assert weights.nbytes(packed.codes) == x.size * bits // 8


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("symmetric", (True, False))
def test_rounding_activations_errs_by_half_a_step(bits, symmetric):
    x = dense(15, (64, 32))
    spread = jnp.abs(x).max(-1) * 2 if symmetric else x.max(-1) - x.min(-1)
    step = spread / (2**bits - (2 if symmetric else 1))
    error = jnp.abs(ActivationFormat(bits, symmetric).round(x) - x).max(-1)
    assert (error <= step * 0.52 + 0.01 * spread).all()


@pytest.mark.parametrize("given", (0, 9, 2.5, "4"))
def test_unknown_bit_widths_are_refused(given):
    with pytest.raises(ValueError, match="accepted: 1 to 8"):
        Integer(given)


def test_normal_float_is_the_papers_table():
    """The sixteen values that QLoRA's appendix E lists."""
    listed = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
              -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
              0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
              0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0)  # fmt: skip
    np.testing.assert_allclose(normal_float(4).levels, listed, atol=2e-6)


def test_weights_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rounded(Integer(4)).block = 8
