"""Ranks are explicit: a vector per channel says how it meets [..., channels]."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_rank(x: jax.Array, ndim: int) -> jax.Array:
    """``x`` with leading axes of length one up to ``ndim`` axes.

    >>> to_rank(jnp.zeros(3), 2).shape
    (1, 3)
    """
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))
