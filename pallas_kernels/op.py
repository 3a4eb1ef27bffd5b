"""An op: one meaning (plain JAX), kernels per platform, and named real cases."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import choice, partition


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Named inputs of an op, for tests, benchmarks and tuning alike.

    ``make(key)`` returns the positional arguments; ``options`` are the keyword
    arguments. ``tiny`` cases run in the interpreter; all are compiled ahead of time
    and timed on devices. ``tolerance`` bounds the relative error (Frobenius norm)
    of each floating output against the reference in float32. ``flops`` counts
    multiplications and additions of the useful work; bytes are measured.
    """

    name: str
    make: Callable[[Array], tuple]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tiny: bool = False
    tolerance: float = 1e-2
    flops: float = 0.0

    @property
    def shapes(self) -> tuple:
        """The arguments as ``ShapeDtypeStruct``; nothing is computed."""
        return jax.eval_shape(self.make, jax.random.key(0))

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """Called like its reference; the backend in force picks the implementation.

    A kernel takes the reference's arguments and ``interpret=``, and raises
    ``NotImplementedError`` with the reason for what it cannot serve, while tracing.
    Arrays without elements are the reference's, on every platform.
    Gradients are the reference's unless the platform is in ``own_gradient``.
    ``layout(args, options)`` says how arguments may be divided over a mesh
    (``partition``); an op without one cannot run there.
    """

    name: str
    reference: Callable
    kernels: Mapping[str, Callable]
    cases: tuple[Case, ...]
    own_gradient: frozenset[str] = frozenset()
    layout: Callable[[tuple, Mapping[str, Any]], partition.Layout] | None = None

    def __call__(self, *args, **options):
        args, options = by_position(self.reference, args, options)
        chosen = choice.current()
        platform = chosen.platform
        if chosen.name == "reference" or _some_empty(args):
            return self.reference(*args, **options)
        several = self.layout and platform != "cpu" and jax.device_count() > 1
        run = self.on_mesh if several else self.on
        try:
            return run(platform, *args, interpret=chosen.interpret, **options)
        except NotImplementedError as missing:
            choice.fall_back(self.name, str(missing))
            return self.reference(*args, **options)

    def on(self, platform: str, *args, interpret: bool = False, **options):
        """The kernel of ``platform``, differentiable; NotImplementedError if none."""
        args, options = by_position(self.reference, args, options)
        kernel = self.kernels.get(platform)
        if kernel is None:
            raise NotImplementedError(f"{self.name} has no kernel for {platform}")

        def run(*args):
            return kernel(*args, interpret=interpret, **options)

        if platform in self.own_gradient:
            return run(*args)
        return with_gradient(run, lambda *a: self.reference(*a, **options))(*args)

    def on_mesh(self, platform: str, *args, interpret: bool = False, **options):
        """``on`` where arguments may be divided over devices; the same elsewhere."""
        assert self.layout is not None
        layout = self.layout(args, options)
        multiple = {"i": math.lcm(partition.WHOLE, options.get("block") or 1)}

        def run(*args):
            return self.on(platform, *args, interpret=interpret, **options)

        def part(*args):
            try:
                return run(*args)
            except NotImplementedError as missing:
                if strict:
                    raise
                choice.warn_once(self.name, platform, f"{missing}, on a mesh")
                return self.reference(*args, **options)

        strict = choice.current().strict
        spread = functools.partial(partition.divided, layout=layout, multiple=multiple)
        if platform in self.own_gradient:
            return with_divided_gradient(run, part, spread, layout)(*args)
        whole = lambda *a: spread(run, part, args=a)  # noqa: E731
        return with_gradient(whole, lambda *a: self.reference(*a, **options))(*args)

    def missing(self, platform: str, *args, **options) -> str | None:
        """Why ``platform`` has no kernel for these arguments, or None if it has."""
        args, options = by_position(self.reference, args, options)
        try:
            jax.eval_shape(lambda *a: self.on(platform, *a, **options), *args)
        except NotImplementedError as reason:
            return str(reason)
        return None


def by_position(
    function: Callable, args: tuple, options: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """``args`` with all that ``function`` takes by position, and the other options.

    Arrays are among ``args``: those have gradients, and are divided over a mesh.
    """
    placed, named = list(args), dict(options)
    for each in list(inspect.signature(function).parameters.values())[len(args) :]:
        missing = each.default is each.empty and each.name not in named
        if missing or each.kind is not each.POSITIONAL_OR_KEYWORD:
            break
        placed.append(named.pop(each.name, each.default))
    return tuple(placed), named


def _some_empty(args: tuple) -> bool:
    """Whether an array has no elements, which leaves nothing for a kernel to do."""
    return any(np.size(a) == 0 for a in jax.tree.leaves(args))


def with_gradient(kernel: Callable, reference: Callable) -> Callable:
    """``kernel`` with the gradient of ``reference`` (recomputed)."""

    @jax.custom_vjp
    def run(*args):
        return kernel(*args)

    def forward(*args):
        return run(*args), args

    def backward(args, cotangent):
        return jax.vjp(reference, *args)[1](cotangent)

    run.defvjp(forward, backward)
    return run


def with_divided_gradient(
    run: Callable, part: Callable, spread: Callable, layout: partition.Layout
) -> Callable:
    """``run`` over a mesh, with its own gradient on each part (recomputed)."""

    @jax.custom_vjp
    def call(*args):
        return spread(run, part, args=args)

    def backward(args, cotangent):
        def pull(function):
            def gradients(cotangent, *args):
                found = jax.vjp(function, *args)[1](cotangent)
                return [a for a in jax.tree.leaves(found) if _floating(a)]

            return gradients

        leaves, tree = jax.tree.flatten(args)
        pairs = zip(partition.texts(layout.arguments, args), leaves, strict=True)
        letters = [text for text, a in pairs if _floating(a)]
        turned = partition.Layout((layout.result, *layout.arguments), letters)
        whole = (cotangent, *args)
        found = spread(pull(run), pull(part), layout=turned, args=whole)
        each = iter(found)
        zero = lambda a: np.zeros(a.shape, jax.dtypes.float0)  # noqa: E731
        back = [next(each) if _floating(a) else zero(a) for a in leaves]
        return jax.tree.unflatten(tree, back)

    call.defvjp(lambda *args: (call(*args), args), backward)
    return call


def _floating(a) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)
