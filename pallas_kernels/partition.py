"""Kernels on a mesh: XLA is told how an op divides, and runs it on each part.

XLA cannot divide a kernel itself. An op names the axes of its arguments by letters,
such as ``("*i", "oi", "oi")`` and ``"*o"`` for y = x W with W stored [out, in]: ``*``
are leading axes, ``.`` one that is never divided. A letter is divided as the weights
(the later arguments) are. Letters that the result lacks are summed over: row-parallel
weights give partial sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

WHOLE = 8  # inputs to a byte of one-bit codes: parts of a weight end between bytes


class Layout(NamedTuple):
    """Letters of each argument (one for all arrays in it) and of the results."""

    arguments: tuple[Any, ...]
    result: Any


@dataclasses.dataclass(frozen=True)
class Named:
    """The letters of every array, leading axes as digits."""

    arguments: list[str]
    results: list[str]
    multiple: Mapping[str, int]  # a part of this letter's axis is a multiple of that

    @classmethod
    def of(cls, layout: Layout, arguments, results, multiple) -> Named:
        return cls(
            _letters(layout.arguments, arguments),
            _letters(layout.result, results),
            multiple,
        )

    def rule(self) -> str:
        """The same for Shardy; axes of different sizes do not share a letter."""
        count = 0

        def factors(letters: str) -> str:
            nonlocal count
            found = []
            for letter in letters:
                own = letter in ".i" or letter not in "".join(self.results)
                count += own
                found.append(f"u{count}" if own else f"s{letter}")
            return " ".join(found)

        sides = (self.arguments, self.results)
        left, right = (", ".join(map(factors, side)) for side in sides)
        return f"{left} -> {right}"

    def axes(self, mesh, shapes) -> dict[str, Any]:
        """The mesh axes of each letter, from how the arguments are divided."""
        found: dict[str, Any] = {}
        for letters, a in reversed(list(zip(self.arguments, shapes, strict=True))):
            spec = tuple(getattr(a.sharding, "spec", ()))
            for letter, axis in zip(letters, spec, strict=False):
                if letter != "." and axis is not None:
                    found.setdefault(letter, axis)
        used: set[str] = set()
        for letter, axis in list(found.items()):
            names = {axis} if isinstance(axis, str) else set(axis)
            if used & names or not self._fits(letter, _parts(mesh, axis), shapes):
                del found[letter]
            else:
                used |= names
        return found

    def _fits(self, letter: str, parts: int, shapes) -> bool:
        """Every axis of this letter divides evenly, but for those of length one."""
        sizes = [
            size
            for letters, a in zip(self.arguments, shapes, strict=True)
            for own, size in zip(letters, a.shape, strict=True)
            if own == letter and size > 1
        ]
        whole = parts * self.multiple.get(letter, 1)
        return all(n % parts == 0 for n in sizes) and max(sizes, default=0) % whole == 0


def _parts(mesh, axis) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def texts(layout, arrays) -> list[str]:
    """The letters of a layout for each array of a tree; absent ones have none."""
    if isinstance(layout, str):
        return [layout] * len(jax.tree.leaves(arrays))
    if arrays is None:
        return []
    pairs = zip(layout, arrays, strict=False)
    return [text for own, below in pairs for text in texts(own, below)]


def _letters(layout, arrays) -> list[str]:
    pairs = zip(texts(layout, arrays), jax.tree.leaves(arrays), strict=True)
    return [_named(text, a.ndim) for text, a in pairs]


def _named(text: str, ndim: int) -> str:
    if not text.startswith("*"):
        return text.ljust(ndim, ".")[:ndim]
    lead = ndim - len(text) + 1
    return "".join(map(str, range(lead))) + text[1:]


def divided(
    run: Callable, local: Callable, layout: Layout, multiple, args: tuple
) -> Any:
    """``run(*args)``, or where a mesh divides the arguments ``local`` on each part.

    The length of an axis i is divided into multiples of ``multiple["i"]``.
    """
    program, results = jax.make_jaxpr(run, return_shape=True)(*args)
    form = jax.tree.structure(results)
    named = Named.of(layout, args, results, multiple)
    named.arguments[:0] = ["." * np.ndim(a) for a in program.consts]

    def traced(constants, *args):
        """``run``; what it has computed while it was traced is an argument too."""
        flat = jax.tree.leaves(args)
        found = jax.core.eval_jaxpr(program.jaxpr, constants, *flat)
        return jax.tree.unflatten(form, found)

    def partition(mesh, arguments, result):
        leaves, tree = jax.tree.flatten(arguments)
        axes = named.axes(mesh, leaves)
        place = lambda text, a: NamedSharding(mesh, _spec(text, a.shape, axes))  # noqa: E731
        inside = map(place, named.arguments, leaves)
        outside = list(map(place, named.results, jax.tree.leaves(results)))
        kept = "".join(named.results)
        summed = [axis for letter, axis in axes.items() if letter not in kept]

        def part(_, *args):
            y = local(*args)
            return jax.tree.map(lambda a: _summed(a, summed), y) if summed else y

        unflatten = jax.tree.unflatten
        return mesh, part, unflatten(form, outside), unflatten(tree, inside)

    on_mesh = custom_partitioning(traced)
    on_mesh.def_partition(partition=partition, sharding_rule=named.rule())

    @custom_vmap
    def call(*args):
        return on_mesh(program.consts, *args)

    @call.def_vmap
    def _(size, batched, *args):
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(batched))
        return jax.vmap(run, axes)(*args), jax.tree.map(lambda _: True, results)

    return jax.jit(call)(*args)


def _spec(letters: str, shape, axes) -> PartitionSpec:
    """What divides an array of these letters; an axis of length one stays whole."""
    pairs = zip(letters, shape, strict=True)
    return PartitionSpec(*(axes.get(x) if size > 1 else None for x, size in pairs))


def _summed(a, axes):
    """The float32 sum over the parts, in the dtype of the parts."""
    names = [n for axis in axes for n in ((axis,) if isinstance(axis, str) else axis)]
    return jax.lax.psum(a.astype(jnp.float32), tuple(names)).astype(a.dtype)
