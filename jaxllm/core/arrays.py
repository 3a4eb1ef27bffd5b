"""What annotations say of arrays in pytrees, and how arrays of two ranks meet."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar, Union

import jax
import jax.numpy as jnp

Held = TypeVar("Held")
# A field of a pytree: the stated array, or what stands for it in a tree operation
# (a name, a shape, a sharding, None).
Leaf = Union[Held, Any]  # noqa: UP007  a generic alias must be written so


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a pytree dataclass that belongs to its structure."""
    return dataclasses.field(default=default, metadata=dict(static=True))


def to_rank(x: jax.Array, ndim: int) -> jax.Array:
    """``x`` with leading axes of length one up to ``ndim`` axes.

    >>> to_rank(jnp.zeros(3), 2).shape
    (1, 3)
    """
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def as_stored(x: jax.Array) -> jax.Array:
    """``x`` in float32 with the values of bfloat16, in which scales are stored."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def straight_through(rounded: jax.Array, x: jax.Array) -> jax.Array:
    """The value of ``rounded`` with the gradient of ``x``."""
    return x + jax.lax.stop_gradient(rounded - x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def peak(x: jax.Array, axis: int = -1) -> jax.Array:
    """The largest value along an axis, which is kept; its first place has the gradient.

    ``jnp.max`` divides its gradient by the number of elements that equal the largest.
    A compiler that computes ``x`` twice, rounding differently, may find none of them.
    """
    return x.max(axis, keepdims=True)


@peak.defjvp
def _peak_slope(axis: int, values, slopes):
    (x,), (slope,) = values, slopes
    place = x.argmax(axis, keepdims=True)
    return peak(x, axis), jnp.take_along_axis(slope, place, axis)


def traced(tree: Any) -> bool:
    """Whether only shapes are known of some leaf: nothing may be decided by values."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
