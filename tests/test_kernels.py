"""Every kernel of every op, by discovery: values, gradients, real compilers, gaps."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import aot, choice, partition
from pallas_kernels.quantized_matmul.cases import random_planes
from pallas_kernels.shapes import Linear

OPS = pallas_kernels.ops()
PAIRS = [
    pytest.param(op, platform, case, id=f"{op.name}-{platform}-{case.name}")
    for op in OPS.values()
    for platform in op.kernels
    for case in op.cases
    if case.tiny
]


def floats(tree):
    """The floating leaves, in float32."""
    leaves = jax.tree.leaves(tree)
    kinds = [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]
    return [np.asarray(a, np.float32) for a in kinds]


def wide(tree):
    """Floating leaves in float32, so that the reference is exact."""
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        tree,
    )


def assert_near(got, want, tolerance):
    for a, b in zip(floats(got), floats(want), strict=True):
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
        assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def integers(tree):
    """The integer leaves; a byte that packs two codes of four bits counts as both."""
    found = []
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype == jnp.uint8:
            found.append(np.stack((leaf & 15, leaf >> 4)).astype(int))
        elif jnp.issubdtype(leaf.dtype, jnp.integer):
            found.append(np.asarray(leaf, int))
    return found


def assert_same_codes(got, want, share=0.01):
    """Codes are equal, but for a small share that rounds a tie the other way."""
    for a, b in zip(integers(got), integers(want), strict=True):
        gap = np.abs(a - b)
        assert gap.max(initial=0) <= 1
        assert (gap > 0).mean() <= share


def compile_fast(run):
    """``run`` under ``jit``, unoptimized: an interpreted kernel runs but once."""
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def with_gradient(run, *, differentiable):
    """``run`` and the gradient of a function of its outputs by its first argument."""

    def scalar(first, *rest):
        outputs = run(first, *rest)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(outputs)), outputs

    def both(*args):
        if not differentiable:
            return run(*args), ()
        gradient, outputs = jax.grad(scalar, has_aux=True)(*args)
        return outputs, gradient

    return both


@pytest.mark.parametrize(("op", "platform", "case"), PAIRS)
def test_values_and_gradients(op, platform, case):
    """A kernel in the interpreter gives what the exact reference gives, in its types.

    The gradient is of the first argument, where that holds floats. Where a platform
    has its own gradient, the outputs without one come from another program.
    """
    interpret = platform != "cpu"
    kernel = functools.partial(op.on, platform, interpret=interpret, **case.options)
    reference = functools.partial(op.reference, **case.options)
    missing = op.missing(platform, *case.shapes, interpret=interpret, **case.options)
    if missing is not None:
        assert missing, "a refusal names its reason"
        pytest.skip(missing)

    args = compile_fast(case.make)(jax.random.key(7, impl="rbg"))
    first = jax.tree.leaves(args[0])
    differentiable = all(jnp.issubdtype(a.dtype, jnp.floating) for a in first)
    both = functools.partial(with_gradient, differentiable=differentiable)
    got, slope = compile_fast(both(kernel))(*args)
    same, expected = compile_fast(both(reference))(*args)
    want = compile_fast(reference)(*wide(args))
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, same)
    assert_near(got, want, case.tolerance)
    assert_same_codes(got, want)
    assert_near(slope, expected, 2 * case.tolerance)
    if platform in op.own_gradient:
        assert_near(compile_fast(kernel)(*args), want, case.tolerance)


@pytest.mark.parametrize("blocks", (1, 2, 32))
@pytest.mark.parametrize("bits", range(1, 9))
def test_few_rows_on_a_cpu(bits, blocks):
    """Whatever the width, rows of bytes are read once, in whole vectors."""
    op, rng = OPS["quantized_matmul"], np.random.default_rng(bits)
    rows, inputs, outputs = 1 + bits % 3, 2048, 512
    keys = iter(jax.random.split(jax.random.key(bits), 3))
    planes = random_planes(keys, Linear("any", "any", inputs, outputs), bits)
    scale = jnp.asarray(rng.uniform(0.5, 1.0, (outputs, blocks)), jnp.float16)
    zero = jnp.asarray(rng.uniform(0, 2**bits - 1, scale.shape), jnp.float16)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    args = (x, planes, scale, zero if blocks < 32 else None)
    options = {"bits": bits, "block": inputs // blocks if blocks > 1 else None}
    got = jax.jit(lambda *a: op.on("cpu", *a, **options))(*args)
    assert_near(got, op.reference(*args, **options), 1e-5)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("platform", ("reference", "tpu", "gpu"))
def test_a_token_with_nan_has_no_finite_scale(platform, bits):
    """Its codes could be those of a row of zeros. The reference has two blocks."""
    op, many = OPS["hadamard_quantize"], platform == "reference"
    x = jax.random.normal(jax.random.key(4), (64 if many else 3, 512 if many else 256))
    args = x.at[0].set(0).at[1:, 7].set(jnp.nan), jnp.eye(2), jnp.eye(128)
    run = functools.partial(op.reference, bits=bits)
    if not many:
        run = functools.partial(op.on, platform, interpret=True, bits=bits)
        if reason := op.missing(platform, *args, interpret=True, bits=bits):
            pytest.skip(reason)
    _, scale = jax.jit(run)(*args)
    assert scale[0, 0] == 1
    assert not jnp.isfinite(scale[1:]).any()


def test_pallas_kernels_needs_jax_alone():
    """In a process that finds nothing but jax and what that is made of."""
    program = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

FOUND = {"pallas_kernels", "jax", "jaxlib", "numpy", "scipy", "ml_dtypes"}
FOUND |= {"opt_einsum", *sys.stdlib_module_names}
FOUND |= {"absl"}  # jax 0.10's Mosaic GPU imports it, which jax does not say

class Alone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name[0] == "_" or name.partition(".")[0] in FOUND:
            return super().find_spec(name, path, target)

sys.meta_path[:] = BuiltinImporter, FrozenImporter, Alone
import jax, pallas_kernels
op = pallas_kernels.ops()["quantized_matmul"]
case = next(case for case in op.cases if case.tiny)
print(op(*case.make(jax.random.key(0)), **case.options).shape)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert run.stdout == "(1, 256)\n", run.stderr[-2000:]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_cases(op):
    """Case names are unique; some are tiny; the reference runs on their shapes."""
    names = [case.name for case in op.cases]
    assert len(names) == len(set(names))
    assert any(case.tiny for case in op.cases)
    for case in op.cases:
        reference = lambda *a, o=case.options: op.reference(*a, **o)  # noqa: E731
        jax.eval_shape(reference, *case.shapes)
        assert case.tiny or case.flops > 0, f"{case}: states no work"
    for platform in op.kernels:
        missing = {
            c.name: op.missing(platform, *c.shapes, **c.options) for c in op.cases
        }
        assert not all(missing.values()), f"{platform} serves no case: {missing}"


def compiled(platform, target, *options):
    """Records of ``pallas_kernels.aot`` in its own process: compilers may crash."""
    run = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.aot", platform, target, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    records = [json.loads(line) for line in run.stdout.splitlines() if line[:1] == "{"]
    assert run.returncode <= 100, run.stderr[-2000:]
    return records


def topologies():
    """(topology, cases of each op): a few everywhere; all of them are a slow test."""
    for i, topology in enumerate(aot.TOPOLOGIES):
        yield pytest.param(topology, ("--sample", "1" if i else "3"), id=topology)
        yield pytest.param(topology, (), id=f"{topology}-all", marks=pytest.mark.slow)


@pytest.mark.parametrize("topology, cases", tuple(topologies()))
def test_tpu_compiler_accepts_every_kernel(topology, cases):
    pytest.importorskip("libtpu", reason="libtpu is not installed (extra tpu-aot)")
    records = compiled("tpu", topology, *cases)
    failed = [r for r in records if r["status"] == "failed"]
    assert not failed, json.dumps(failed, indent=1)
    assert any(r["status"] == "compiled" for r in records)


def test_cuda_compiler_accepts_every_kernel():
    pytest.importorskip("jax_cuda13_plugin", reason="no CUDA plugin (extra cuda-aot)")
    records = compiled("cuda", "h200", "--sample", "6")
    failed = [r for r in records if r["status"] == "failed"]
    assert not failed, json.dumps(failed, indent=1)
    assert any(r["status"] == "compiled" for r in records)


class TestBackend:
    """The choice of an implementation: automatic, forced, strict, loud once."""

    @pytest.fixture
    def op(self):
        def reference(x):
            return 2 * x

        def kernel(x, *, interpret):
            if x.ndim > 1:
                raise NotImplementedError("only vectors")
            return 2 * x + 0 * interpret

        return pallas_kernels.Op("double", reference, {"gpu": kernel}, ())

    def test_cpu_runs_the_reference_silently(self, op):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert op(jnp.ones(3)).sum() == 6

    def test_strict_raises_where_auto_warns(self, op, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        choice.warn_once.cache_clear()
        with pytest.warns(pallas_kernels.KernelFallback, match="only vectors"):
            op(jnp.ones((2, 2)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            op(jnp.ones((2, 2)))  # said once
        with (
            pallas_kernels.backend("strict"),
            pytest.raises(NotImplementedError, match="only vectors"),
        ):
            op(jnp.ones((2, 2)))

    def test_forced(self, op):
        with (
            pallas_kernels.backend("tpu"),
            pytest.raises(NotImplementedError, match="no kernel for tpu"),
        ):
            op(jnp.ones(3))
        with pallas_kernels.backend("gpu", interpret=True):
            assert op(jnp.ones(3)).sum() == 6

    def test_survey_says_what_would_fall_back(self, op):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pallas_kernels.survey("gpu") as found:
                jax.eval_shape(jax.jit(op), jnp.ones(3))
                jax.eval_shape(jax.jit(op), jnp.ones((2, 2)))
        assert found.missing == {"double": ["only vectors"]}
        with pallas_kernels.survey("tpu") as found:
            jax.eval_shape(jax.jit(op), jnp.ones(3))
        assert found.missing == {"double": ["double has no kernel for tpu"]}

    def test_unknown(self):
        with (
            pytest.raises(ValueError, match="accepted: auto, strict"),
            pallas_kernels.backend("cuda"),
        ):
            pass

    def test_jit_traces_anew(self, op):
        with_jit = jax.jit(op)
        assert with_jit(jnp.ones(3)).sum() == 6
        with pallas_kernels.backend("tpu"), pytest.raises(NotImplementedError):
            with_jit(jnp.ones(3))


def cut_to_nothing(op, letters: str):
    """A tiny case without leading axes, outputs or inputs (``op.layout``'s letters)."""
    case = next(case for case in op.cases if case.tiny)
    layout = op.layout(case.shapes, case.options)
    names = partition.Named.of(layout, case.shapes, (), {}).arguments
    leaves, tree = jax.tree.flatten(case.shapes)

    def cut(name, a):
        """One block of all inputs stays one."""
        pairs = zip(name, a.shape, strict=True)
        gone = lambda own, size: own in letters and (own != "i" or size > 1)  # noqa: E731
        return np.zeros([0 if gone(*pair) else pair[1] for pair in pairs], a.dtype)

    made = [cut(*pair) for pair in zip(names, leaves, strict=True)]
    used = set(letters) & set("".join(names))
    return jax.tree.unflatten(tree, made), case.options, used


CUTS = {"rows": "0b", "outputs": "o", "inputs": "i"}
NOTHING = [
    pytest.param(*found[:2], op, id=f"{op.name}-{what}")
    for op in OPS.values()
    for what, letters in CUTS.items()
    for found in [cut_to_nothing(op, letters)]
    if found[2]
]
SHORT = {"scale": lambda a: a[:, :-1], "bytes": lambda a: (*a[:-1], a[-1][:, :-1])}
# Op, argument that a function changes, options beside those of a tiny case, message.
REFUSED = [
    ("quantized_matmul", {}, {"block": 64}, r"scale \(256, 2\); accepted: \(256, 4\)"),
    ("quantized_matmul", {}, {"block": 0}, "blocks of 0 inputs"),
    ("quantized_matmul", {}, {"bits": 2}, r"planes uint8\[256, 32\]; accepted"),
    ("quantized_matmul", {}, {"levels": (0.0,)}, "1 levels for codes of 1 bits"),
    ("quantized_matmul", {2: SHORT["scale"]}, {}, r"scale \(256, 1\)"),
    ("quantized_matmul", {1: SHORT["bytes"]}, {}, r"planes uint8\[256, 31\]"),
    ("quantized_matmul", {0: lambda x: x[:, :-8]}, {}, "planes"),
    ("quantized_matmul", {3: lambda _: jnp.ones((256, 1))}, {}, "zero"),
    ("quantized_matmul", {4: lambda _: [jnp.ones((9, 9))] * 2}, {}, "low_rank"),
    ("plane_matmul", {}, {"block": 64}, r"scales\[0\] \(256, 1\)"),
    ("plane_matmul", {}, {"kind": "trits"}, r"accepted: uint8\[256, 52\]"),
    ("plane_matmul", {3: lambda _: jnp.ones((256, 2))}, {}, "bias"),
    ("two_level_matmul", {1: SHORT["bytes"]}, {}, "planes"),
    ("two_level_matmul", {}, {"block": 0}, "blocks of 0 inputs"),
    ("nm_matmul", {2: lambda a: (a,)}, {}, "planes, bits and scale go together"),
    ("nm_matmul", {2: lambda a: (a,), 3: lambda _: jnp.ones((256, 1))}, {"bits": 8},
     r"planes float32\[256, 128\]; accepted: uint8\[256, 128\]"),
    ("scaled_matmul", {}, {"block": -1}, "blocks of -1 inputs"),
]  # fmt: skip


class TestArguments:
    """By name or by position, with nothing in them, or of shapes that do not fit."""

    @pytest.fixture
    def quantized(self):
        """An op, and x, planes, scale and zero that its kernels serve."""
        keys = jax.random.split(jax.random.key(2), 4)
        x = jax.random.normal(keys[0], (2, 256))
        planes = (jax.random.bits(keys[1], (256, 128), jnp.uint8),)
        scale, zero = (jax.random.uniform(key, (256, 4)) for key in keys[2:])
        op = functools.partial(OPS["quantized_matmul"], bits=4, block=64)
        return op, (x, planes, scale, zero)

    def test_gradients_of_what_is_passed_by_name(self, quantized):
        op, (x, planes, scale, zero) = quantized
        by_name = lambda z: jnp.sin(op(x, planes, scale=scale, zero=z)).sum()  # noqa: E731
        by_place = lambda z: jnp.sin(op(x, planes, scale, z)).sum()  # noqa: E731
        np.testing.assert_array_equal(jax.grad(by_name)(zero), jax.grad(by_place)(zero))

    def test_a_mesh_divides_what_is_passed_by_name(self, quantized):
        op, args = quantized
        rows = P("tensor", None)
        run = lambda x, planes, scale, zero: op(x, planes, zero=zero, scale=scale)  # noqa: E731
        got, program = on_mesh(run, args, (P("data", None), (rows,), rows, rows))
        assert_near(got, run(*args), 1e-2)
        assert "all-gather" not in program

    def test_unknown_and_missing_names(self, quantized):
        op, (x, planes, scale, _) = quantized
        with pytest.raises(TypeError, match="unexpected keyword argument 'blocks'"):
            op(x, planes, scale, blocks=2)
        with pytest.raises(TypeError, match=r"missing .*'scale'"):
            op(x, planes, zero=scale)

    @pytest.mark.parametrize(("args", "options", "op"), NOTHING)
    def test_nothing_gives_nothing_or_zeros(self, args, options, op):
        want = jax.eval_shape(lambda *a: op.reference(*a, **options), *args)
        with pallas_kernels.backend("tpu", interpret=True):
            got = jax.jit(functools.partial(op, **options))(*args)
        shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
        assert shapes(got) == shapes(want)
        assert not any(a.any() for a in jax.tree.leaves(got))

    @pytest.mark.parametrize(("name", "changes", "options", "message"), REFUSED)
    def test_what_does_not_fit_is_refused(self, name, changes, options, message):
        op = OPS[name]
        case = next(case for case in op.cases if case.tiny)
        args = dict(enumerate(case.shapes))
        ones = lambda tree: jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tree)  # noqa: E731
        args |= {i: change(ones(args.get(i))) for i, change in changes.items()}
        ordered = [args.get(i) for i in range(1 + max(args))]
        with pytest.raises(ValueError, match=message):
            op.missing("tpu", *ordered, **{**case.options, **options})

    def test_levels_or_zero_points(self, quantized):
        op, args = quantized
        with pytest.raises(ValueError, match="levels and zero"):
            op(*args, levels=tuple(range(16)))

    def test_a_block_may_exceed_the_inputs(self):
        op = OPS["scaled_matmul"]
        args = op.cases[0].make(jax.random.key(1))
        assert_near(op(*args, block=1000), op(*args, block=None), 1e-6)


def sharded(op, platform, args, options, specs, out):
    """``op`` on eight devices, each with its share of the arguments."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    run = lambda *a: op.on(platform, *a, interpret=True, **options)  # noqa: E731
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
    )
    return jax.jit(mapped)(*args)


class TestSharded:
    """Kernels under ``shard_map``: eight devices give what one gives."""

    def test_outputs_of_a_quantized_matmul(self):
        op = OPS["quantized_matmul"]
        keys = jax.random.split(jax.random.key(3), 4)
        x = jax.random.normal(keys[0], (4, 256))
        planes = (jax.random.bits(keys[1], (1024, 128), jnp.uint8),)
        scale = jax.random.uniform(keys[2], (1024, 2))
        args, options = (x, planes, scale), {"bits": 4, "block": 128}
        rows = P("x", None)
        specs = (P(), rows, rows)
        got = sharded(op, "tpu", args, options, specs, P(None, "x"))
        assert_near(got, op.reference(*args, **options), 1e-2)

    def test_heads_of_decode_attention(self):
        op = OPS["decode_attention"]
        keys = jax.random.split(jax.random.key(4), 3)
        q = jax.random.normal(keys[0], (2, 16, 64))
        k, v = (jax.random.normal(key, (2, 256, 8, 64)) for key in keys[1:])
        args = q, k, v, jnp.array([256, 100])
        cache = P(None, None, "x", None)
        heads = P(None, "x", None)
        specs = (heads, cache, cache, P())
        got = sharded(op, "tpu", args, {}, specs, heads)
        assert_near(got, op.reference(*args), 1e-2)


def on_mesh(run, args, specs):
    """``run`` compiled for arguments that lie on a mesh of 2 x 4, and its result."""
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=axes)
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    placed = jax.tree.map(place, args, specs)
    with pallas_kernels.backend("tpu", interpret=True):
        compiled = jax.jit(run).lower(*placed).compile()
    return compiled(*placed), compiled.as_text()


def on_axes(op, case, split: str):
    """Specs of a case's arguments: leading axes over data, ``split`` over tensor."""
    letters = partition.Named.of(
        op.layout(case.shapes, case.options), case.shapes, (), {}
    ).arguments
    leaves, tree = jax.tree.flatten(case.shapes)
    named = [
        (letter, size)
        for text, a in zip(letters, leaves, strict=True)
        for letter, size in zip(text, a.shape, strict=True)
        if size > 1
    ]
    group = np.lcm(partition.WHOLE, case.options.get("block") or 1)
    least = dict.fromkeys(split, ("tensor", 4)) | dict.fromkeys("0b", ("data", 2))
    axes = {
        letter: axis
        for letter, (axis, parts) in least.items()
        if all(size % parts == 0 for own, size in named if own == letter)
        and (letter != "i" or case.shapes[0].shape[-1] % (parts * group) == 0)
    }
    specs = [
        P(*(axes.get(x) if n > 1 else None for x, n in zip(text, a.shape, strict=True)))
        for text, a in zip(letters, leaves, strict=True)
    ]
    used = {axis for spec in specs for axis in spec if axis}
    return jax.tree.unflatten(tree, specs), used


def divisible(op, split: str):
    """The op's tiny case that most axes of a mesh divide, its specs and the axes."""
    parts = {"data": 2, "tensor": 4, None: 1}

    def part(a, spec):
        pairs = itertools.zip_longest(a.shape, spec)
        return jax.ShapeDtypeStruct([n // parts[axis] for n, axis in pairs], a.dtype)

    found = [(c, *on_axes(op, c, split)) for c in op.cases if c.tiny]
    served = [
        item
        for item in found
        for shapes in [jax.tree.map(part, item[0].shapes, item[1])]
        if not op.missing("tpu", *shapes, **item[0].options)
    ]
    return max(served, key=lambda item: len(item[2]))


class TestMesh:
    """Called on a mesh, ops divide their arguments by themselves."""

    @pytest.mark.parametrize("split", ["oh", "i"], ids=["outputs", "inputs"])
    @pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
    def test_every_op_divides_a_case(self, op, split):
        """Rows and outputs, heads or inputs: equal results, and nothing is gathered."""
        case, specs, axes = divisible(op, split)
        if split == "i" and "tensor" not in axes:
            pytest.skip("its inputs are never divided, or no tiny case divides")
        assert axes
        args = case.make(jax.random.key(9))
        run = functools.partial(op, **case.options)
        got, program = on_mesh(run, args, specs)
        want = op.reference(*wide(args), **case.options)
        assert_near(got, want, max(case.tolerance, 1e-4 if split == "i" else 0))
        assert_same_codes(got, want)
        assert "all-gather" not in program
        assert ("all-reduce" in program) == (split == "i")

    def test_column_then_row_parallel_weights(self):
        """No weight moves; only partial sums of the second map are added up."""
        op, keys = OPS["quantized_matmul"], jax.random.split(jax.random.key(5), 5)
        x = jax.random.normal(keys[0], (4, 256))
        up = jax.random.bits(keys[1], (1024, 128), jnp.uint8)
        down = jax.random.bits(keys[2], (256, 512), jnp.uint8)
        s_up = jax.random.uniform(keys[3], (1024, 4))
        s_down = jax.random.uniform(keys[4], (256, 16))

        def run(x, up, s_up, down, s_down):
            hidden = op(x, (up,), s_up, bits=4, block=64)
            return op(jnp.tanh(hidden), (down,), s_down, bits=4, block=64)

        args = x, up, s_up, down, s_down
        columns, rows = P("tensor", None), P(None, "tensor")
        specs = P("data", None), columns, columns, rows, rows
        got, program = on_mesh(run, args, specs)
        assert_near(got, run(*args), 1e-2)
        assert "all-reduce" in program
        assert "all-gather" not in program

    def test_trits_divide_between_outputs_alone(self):
        op, keys = OPS["plane_matmul"], jax.random.split(jax.random.key(6), 3)
        x = jax.random.normal(keys[0], (2, 100))
        plane = jax.random.randint(keys[1], (128, 20), 0, 243).astype(jnp.uint8)
        scale = jax.random.uniform(keys[2], (128, 1))
        run = lambda x, p, s: op(x, (p,), (s,), kind="trits", block=None)  # noqa: E731
        rows = P(None, "tensor")
        got, _ = on_mesh(run, (x, plane, scale), (P(), P("tensor", None), P()))
        assert_near(got, run(x, plane, scale), 1e-2)
        got, _ = on_mesh(run, (x, plane, scale), (rows, rows, P()))
        assert_near(got, run(x, plane, scale), 1e-2)

    def test_heads_of_attention_and_their_gradients(self):
        op, keys = OPS["flash_attention"], jax.random.split(jax.random.key(7), 3)
        q = jax.random.normal(keys[0], (2, 128, 8, 64))
        k, v = (jax.random.normal(key, (2, 128, 4, 64)) for key in keys[1:])

        def run(q, k, v):
            return jax.value_and_grad(lambda *a: jnp.sin(op(*a)).sum(), (0, 1, 2))(
                q, k, v
            )

        heads = (P("data", None, "tensor", None),) * 3
        got, program = on_mesh(run, (q, k, v), heads)
        assert_near(got, run(q, k, v), 2e-2)
        assert "all-gather" not in program

    def test_a_mapped_axis_stays_on_each_device(self):
        op, keys = OPS["quantized_matmul"], jax.random.split(jax.random.key(8), 3)
        x = jax.random.normal(keys[0], (3, 2, 256))
        plane = jax.random.bits(keys[1], (64, 128), jnp.uint8)
        scale = jax.random.uniform(keys[2], (64, 1))
        run = lambda x: op(x, (plane,), scale, bits=4, block=None)  # noqa: E731
        with pallas_kernels.backend("tpu", interpret=True):
            assert_near(jax.vmap(run)(x), run(x), 1e-5)
