"""Dual grained rounding: integer scales per group inside a float scale per output.

Scales are searched in two phases (DGQ, arXiv:2310.04836): first a real one per group,
then the output's scale on which the groups' become integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core import metrics
from jaxllm.core.arrays import as_stored
from jaxllm.core.formats import TINY, Integer
from jaxllm.core.spec import expression
from jaxllm.core.weights import TwoLevel

INT8 = 127


@expression
def dual_grained(
    bits: int = 4,
    block: int = 128,
    steps: int = 20,
    coarse_steps: int = 80,
    metric=metrics.gram(0.0),
):
    """w = s k_g (q - z_g): q of ``bits``, k_g an integer per group, s per output.

    Phase one shrinks each group's range to the least error of that group's share of
    the output; phase two shrinks the output's int8 range, k_g = round(s_g / s), to the
    least error of the output. |k_g (q - z_g)| <= 127 bounds the codes.
    """
    if not 1 <= bits <= 7 or block < 1 or min(steps, coarse_steps) < 1:
        raise ValueError(
            f"dual_grained({bits}, {block}, {steps}, {coarse_steps}): 1 to 7 bits, "
            "block and steps at least 1"
        )

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("two levels of scales do not keep a sparse support")
        size = min(block, len(w))
        h, dense = metric(stats, len(w)).full(), w.astype(jnp.float32)
        group_scale, zero = _fine(dense, h, Integer(bits), size, steps)
        found = _coarse(dense, h, group_scale, zero, Integer(bits), size, coarse_steps)
        codes, gain, scale = found
        return TwoLevel.of(codes.T, gain.T, zero.T, scale, bits, size, w.dtype)

    return solve


def _fine(w: Float[Array, "in out"], h, grid: Integer, block: int, steps: int):
    """Scales and zero points [groups, out], each the best of ``steps`` ranges."""
    short = -len(w) % block
    groups = jnp.pad(w, ((0, short), (0, 0))).reshape(-1, block, w.shape[1])
    h = jnp.pad(h, ((0, short), (0, short))).reshape(len(groups), block, -1, block)
    own = jnp.moveaxis(jnp.diagonal(h, axis1=0, axis2=2), -1, 0)
    low, high = jnp.minimum(groups.min(1), 0), jnp.maximum(groups.max(1), 0)

    def params(shrink):
        scale = jnp.maximum((high - low) * shrink / (grid.codes - 1), TINY)
        return scale, jnp.clip(jnp.round(-low * shrink / scale), 0, grid.codes - 1)

    def loss(shrink):
        scale, zero = (p[:, None] for p in params(shrink))
        back = grid.decode(grid.encode(groups / scale, zero), zero) * scale
        error = groups - back
        return (error * (own @ error)).sum(1)

    shrinks = jnp.asarray(np.linspace(1.0, 0.8, steps), jnp.float32)
    return params(shrinks[jax.lax.map(loss, shrinks).argmin(0)])


def _coarse(w, h, group_scale, zero, grid: Integer, block: int, steps: int):
    """Codes [in, out], integer scales [groups, out] and the scale [out]."""
    peak = jnp.maximum(jnp.abs(w).max(0), TINY)
    wide = lambda x: jnp.repeat(x, block, 0)[: len(w)]  # noqa: E731

    def rounded(shrink):
        scale = as_stored(peak * shrink / INT8)
        gain = jnp.clip(jnp.round(group_scale / scale[None]), 1, INT8)
        reach = jnp.floor(INT8 / gain)
        low = jnp.maximum(zero - reach, 0)
        high = jnp.minimum(zero + reach, grid.codes - 1)
        u = jnp.round(w / (wide(gain) * scale[None])) + wide(zero)
        return jnp.clip(u, wide(low), wide(high)), gain, scale

    def loss(shrink):
        codes, gain, scale = rounded(shrink)
        error = w - (codes - wide(zero)) * wide(gain) * scale[None]
        return (error * (h @ error)).sum(0)

    shrinks = jnp.asarray(np.linspace(1.0, 0.2, steps), jnp.float32)
    return rounded(shrinks[jax.lax.map(loss, shrinks).argmin(0)])
