"""Channel disassembly and assembly: outlier channels split, alike channels merged.

QLLM (arXiv:2310.08041, section 4.1): x_i w_i = T (x_i / T) w_i leaves the output alone,
x_i w_i + x_j w_j ~ (x_i + x_j) / 2 (w_i + w_j) gives the added channels back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core.formats import TINY, ActivationFormat
from jaxllm.core.spec import expression
from jaxllm.core.stats import Stats, output_energy
from jaxllm.core.weights import ActivationQuantized, Reassembly, Transformed

MOST = 255  # parts of a channel: a byte


@expression(needs=("absmax", "gram"))
def reassembled(
    solve, activations: ActivationFormat, ratio: float = 0.1, steps: int = 20
):
    """Another solver on as many channels of a smaller range, its input rounded.

    With a threshold t channel i has T_i = ceil(max|x_i| / t) parts, and the pairs of
    least E[(x_i - x_j)^2] |w_i - w_j|^2 / 4 (even with odd channels, each once) are
    merged for them. Of ``steps`` thresholds that add at most a share ``ratio`` of the
    channels, the one is taken whose merging and rounding cost least; the rounding
    noise is taken as even, (max|x'| / q_max)^2 / 12 per channel.
    """
    if not 0 < ratio <= 0.5 or steps < 1:
        raise ValueError(f"ratio {ratio}, steps {steps}: 0 < ratio <= 0.5, at least 1")

    def run(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("reassembled channels do not keep a sparse support")
        dense, peak = w.astype(jnp.float32), jnp.maximum(stats.absmax.value, TINY)
        h, largest = stats.gram.mean, activations.format.largest
        cost = _pair_costs(dense, h)
        most = int(ratio * len(w))

        def price(share):
            op, extra = _op(peak, cost, share * peak.max(), most)
            error = dense - op.apply(jnp.eye(len(w))) @ _rows(op, dense)
            step = (peak[op.first] / op.parts.astype(jnp.float32)).max() / largest
            noise = step**2 / 12 * (_rows(op, dense) ** 2).sum()
            total = output_energy(h, error) + noise
            return jnp.where(extra <= most, total, jnp.inf)

        shares = jnp.asarray(1 - np.arange(steps) / steps, jnp.float32)
        best = shares[jax.lax.map(price, shares).argmin()]
        op, _ = _op(peak, cost, best * peak.max(), most)
        seen = Stats({"gram": stats.gram.through(op)})
        made = solve(_rows(op, dense).astype(w.dtype), seen, key, None)
        return Transformed(op, ActivationQuantized(made, activations))

    return run


def _pair_costs(w, h) -> Float[Array, "in in"]:
    """The squared output error of merging two channels, infinite where not allowed."""
    apart = lambda g: jnp.diagonal(g)[:, None] + jnp.diagonal(g)[None] - 2 * g  # noqa: E731
    cost = apart(h) * apart(w @ w.T) / 4
    even = jnp.arange(len(w)) % 2 == 0
    return jnp.where(even[:, None] & ~even[None], cost, jnp.inf)


def _op(peak, cost, threshold, most: int):
    """The reassembly at a threshold, and how many channels it adds.

    Beyond ``most`` added channels it is of no use, but has the same shape.
    """
    count, every = len(peak), jnp.arange(len(peak))
    parts = jnp.clip(jnp.ceil(peak / threshold), 1, MOST).astype(jnp.int32)
    extra = parts.sum() - count
    whole = parts == 1
    cost = jnp.where(whole[:, None] & whole[None], cost, jnp.inf)
    mate, least = cost.argmin(1), cost.min(1)
    firsts = jax.ops.segment_min(least, mate, count)  # a channel takes one other
    least = jnp.where(least == firsts[mate], least, jnp.inf)
    order = jnp.argsort(least, stable=True)
    chosen = jnp.zeros(count, bool).at[order].set(every < extra)
    chosen &= jnp.isfinite(least)
    extra = jnp.where(chosen.sum() < extra, most + 1, extra)
    partner = every.at[jnp.where(chosen, mate, count)].set(every, mode="drop")
    copies = jnp.where(chosen, 0, parts)
    slot = jnp.repeat(every, copies, total_repeat_length=count)
    small = np.min_scalar_type(count - 1)
    leaves = slot.astype(small), partner[slot].astype(small)
    return Reassembly(*leaves, parts[slot].astype(jnp.uint8)), extra


def _rows(op: Reassembly, w: Float[Array, "in out"]):
    """The weights of the new channels: their own, or the sum of two."""
    merged = (op.first != op.second)[:, None]
    return w[op.first] + jnp.where(merged, w[op.second], 0.0)
