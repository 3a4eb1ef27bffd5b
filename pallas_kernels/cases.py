"""What the named cases of several ops have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.op import Case
from pallas_kernels.shapes import Heads, Linear


def group(block: int | None) -> str:
    """How a name says which inputs share a scale."""
    return "channel" if block is None else f"g{block}"


def linear_case(
    linear: Linear,
    label: str,
    make: Callable,
    options,
    /,
    *,
    work=1.0,
    exact=False,
    **inputs: Any,
) -> Case:
    """A product of floats; ``inputs`` (``rows``, ...) go to ``make``.

    Tiny ones are float32, and ``exact`` up to its rounding. ``work`` is the share of a
    dense product's multiplications.
    """
    tiny, rows = linear.model == "tiny", inputs["rows"]
    dtype = jnp.float32 if tiny else jnp.bfloat16
    return Case(
        f"{linear.name}/{label}/m{rows}",
        functools.partial(make, linear=linear, dtype=dtype, **inputs),
        options,
        tiny=tiny,
        tolerance=1e-5 if tiny and exact else 1e-2,
        flops=2.0 * rows * linear.inputs * linear.outputs * work,
    )


def integer_case(
    linear: Linear, label: str, make: Callable, options, /, **inputs: Any
) -> Case:
    """A product of integers, exact but for the dtype of its result."""
    tiny, rows = linear.model == "tiny", inputs["rows"]
    out_dtype = jnp.float32 if tiny else jnp.bfloat16
    return Case(
        f"{linear.name}/{label}/m{rows}",
        functools.partial(make, linear=linear, **inputs),
        {**options, "out_dtype": out_dtype},
        tiny=tiny,
        tolerance=1e-5 if tiny else 1e-2,
        flops=2.0 * rows * linear.inputs * linear.outputs,
    )


def attention_case(
    name: str, heads: Heads, make: Callable, options, pairs: float, /, **inputs: Any
) -> Case:
    """Attention that computes ``pairs`` of a query and a key for each query head."""
    tiny = heads.model == "tiny"
    dtype = jnp.float32 if tiny else jnp.bfloat16
    return Case(
        f"{heads.model}/{name}",
        functools.partial(make, heads=heads, dtype=dtype, **inputs),
        options,
        tiny=tiny,
        flops=4.0 * heads.queries * heads.width * pairs,
    )
