"""Orthogonal matrices: Cayley transforms, and descent among them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def cayley(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """(I + A)^-1 (I - A) with A = X - XT: orthogonal for every X, I for zero."""
    skew, eye = x - x.T, jnp.eye(len(x), dtype=x.dtype)
    return jnp.linalg.solve(eye + skew, eye - skew)


def cayley_step(
    x: Float[Array, "n n"], gradient: Float[Array, "n n"], rate
) -> Float[Array, "n n"]:
    """One step of Cayley SGD (arXiv:2002.01113, algorithm 1), without momentum.

    W = M XT - X XT M XT / 2 less its transpose, with M = -G, and X moves to
    (I - a W / 2)^-1 (I + a W / 2) X with a = min(rate, 1 / |W|_1). The paper solves by
    fixed-point iteration, here it is exact; momentum is none in SpinQuant's code.
    """
    m = -gradient
    half = m @ x.T - 0.5 * x @ (x.T @ m @ x.T)
    w = half - half.T
    a = jnp.minimum(rate, 1 / (jnp.abs(w).sum(0).max() + 1e-8))
    eye = jnp.eye(len(x), dtype=x.dtype)
    return jnp.linalg.solve(eye - 0.5 * a * w, (eye + 0.5 * a * w) @ x)
