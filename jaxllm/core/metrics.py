"""Metrics: how much an error in each input of a linear layer costs.

A metric is called with the layer's statistics and the number of inputs. It gives the
loss |F (W - V)|^2 of replacing W [in, out] by V through ``matrix`` = FT F [in, in] or
its diagonal ``importance`` [in].
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.spec import expression
from jaxllm.core.sweep import upper_factor


@dataclasses.dataclass(frozen=True)
class Metric:
    """``importance`` [in], and the full ``matrix`` [in, in] where there is one.

    ``importance`` [in, out] is that of each weight. ``drift`` = E[(x~ - x) xT] is how
    the inputs differ from those (x~) whose outputs are wanted.
    """

    importance: Float[Array, "in"] | Float[Array, "in out"]
    matrix: Float[Array, "in in"] | None = None
    drift: Float[Array, "in in"] | None = None

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
def absolute(alpha: float = 1.0):
    """E[|x|]^(2 alpha) of each input (ASVD and AWQ rank by the mean magnitude)."""
    return lambda stats, count: Metric(stats.moments.mean_absolute ** (2 * alpha))


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


@expression
def pivots(metric=gram(), later: bool = False):
    """1 / [H^-1]_ii of another metric H: what one error costs once others adapt.

    ``later``: once only later inputs do, as in a sweep: 1 / U_ii^2 with U the upper
    Cholesky factor of H^-1.
    """

    def diagonal_of(stats, count):
        h = metric(stats, count).full()
        if later:
            return Metric(1 / jnp.diagonal(upper_factor(h)) ** 2)
        eye = jnp.eye(len(h), dtype=h.dtype)
        lower = jax.scipy.linalg.solve_triangular(
            jnp.linalg.cholesky(h), eye, lower=True
        )
        return Metric(1 / (lower**2).sum(0))

    return diagonal_of


@expression(needs=("drift",))
def asymmetric(metric=gram(), share: float = 0.25):
    """The output error |W x~ - V x|^2 against the dense model's inputs x~ (GPTAQ).

    ``share`` of the drift is corrected (the authors' code uses a quarter); expert
    weights have none, since the two streams route tokens differently.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}; accepted: 0 to 1")

    def drifting(stats, count):
        found = metric(stats, count)
        return dataclasses.replace(found, drift=share * stats.drift.mean)

    return drifting


@expression(needs=("fisher",))
def fisher():
    """The squared gradient of the loss, weight by weight."""
    return lambda stats, count: Metric(stats.fisher.mean)
