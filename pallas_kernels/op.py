"""An op: one meaning (plain JAX), kernels per platform, and named real cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from pallas_kernels import choice


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
    Gradients are the reference's unless the platform is in ``own_gradient``.
    """

    name: str
    reference: Callable
    kernels: Mapping[str, Callable]
    cases: tuple[Case, ...]
    own_gradient: frozenset[str] = frozenset()

    def __call__(self, *args, **options):
        chosen = choice.current()
        platform = chosen.platform
        if chosen.name == "reference":
            return self.reference(*args, **options)
        try:
            return self.on(platform, *args, interpret=chosen.interpret, **options)
        except NotImplementedError as missing:
            choice.fall_back(self.name, str(missing))
            return self.reference(*args, **options)

    def on(self, platform: str, *args, interpret: bool = False, **options):
        """The kernel of ``platform``, differentiable; NotImplementedError if none."""
        kernel = self.kernels.get(platform)
        if kernel is None:
            raise NotImplementedError(f"{self.name} has no kernel for {platform}")

        def run(*args):
            return kernel(*args, interpret=interpret, **options)

        if platform in self.own_gradient:
            return run(*args)
        return with_gradient(run, lambda *a: self.reference(*a, **options))(*args)

    def missing(self, platform: str, *args, **options) -> str | None:
        """Why ``platform`` has no kernel for these arguments, or None if it has."""
        try:
            jax.eval_shape(lambda *a: self.on(platform, *a, **options), *args)
        except NotImplementedError as reason:
            return str(reason)
        return None


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
