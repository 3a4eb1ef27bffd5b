"""The members of the vocabulary by name, for specs written as text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

from jaxllm.core import (  # noqa: F401
    additive,
    affine,
    allocate,
    channel_scales,
    codebooks,
    compensation,
    compose,
    depth,
    descent,
    equivalences,
    evolution,
    exempt,
    gates,
    incoherence,
    inputs,
    l0,
    latency,
    learned,
    masks,
    metrics,
    mixtures,
    ordering,
    patterns,
    ranges,
    ranks,
    reassembly,
    reconstruct,
    regrow,
    removal,
    rescale,
    rotations,
    scales,
    search,
    sensitivity,
    solvers,
    spin,
    splits,
    stacks,
    tensors,
    tokens,
    two_level,
    units,
    vectors,
    whole,
    width,
)
from jaxllm.core.formats import activation, base, mixed, tables  # noqa: F401

# A module of core belongs to the vocabulary where it is imported above.
MODULES = tuple(
    module
    for module in tuple(globals().values())
    if isinstance(module, ModuleType) and module.__name__.startswith("jaxllm.core.")
)


@functools.cache
def members() -> dict[str, Callable]:
    """Public functions and classes that the modules of the vocabulary define."""
    found: dict[str, Callable] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            public = not name.startswith("_") and callable(value)
            if public and getattr(value, "__module__", None) == module.__name__:
                if name in found:
                    raise ImportError(f"two members are called {name!r}")
                if inspect.isfunction(value) or inspect.isclass(value):
                    found[name] = value
    return found
