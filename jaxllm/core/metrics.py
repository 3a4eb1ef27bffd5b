"""Metrics: how much an error in each input of a linear layer costs.

A metric is called with the layer's statistics and the number of inputs. It gives the
loss |F (W - V)|^2 of replacing W [in, out] by V through ``matrix`` = FT F [in, in] or
its diagonal ``importance`` [in].
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.spec import expression


@dataclasses.dataclass(frozen=True)
class Metric:
    """``importance`` [in], and the full ``matrix`` [in, in] where there is one."""

    importance: Float[Array, "in"]
    matrix: Float[Array, "in in"] | None = None

    def full(self) -> Float[Array, "in in"]:
        return jnp.diag(self.importance) if self.matrix is None else self.matrix


@expression
def identity():
    """All inputs alike: plain weight error."""
    return lambda stats, count: Metric(jnp.ones(count))


@expression(needs=("moments",))
def diagonal():
    """E[x^2] of each input."""
    return lambda stats, count: Metric(stats.moments.mean_square)


@expression(needs=("moments",))
def absolute():
    """E[|x|]^2 of each input (ASVD and AWQ rank inputs by the mean magnitude)."""
    return lambda stats, count: Metric(stats.moments.mean_absolute**2)


@expression(needs=("gram",))
def gram(damping: float = 0.01):
    """E[x xT] + damping mean(diagonal) I: the layer's output error.

    Inputs that never fire get a unit diagonal, so that the matrix can be inverted.
    """
    if damping < 0:
        raise ValueError(f"damping {damping}; accepted: at least 0")

    def metric(stats, count):
        h = stats.gram.mean
        diagonal = jnp.diagonal(h)
        extra = damping * diagonal.mean() + jnp.where(diagonal == 0, 1.0, 0.0)
        return Metric(diagonal, h + jnp.diag(extra))

    return metric
