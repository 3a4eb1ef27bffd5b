"""Additive codebooks: sums of entries, chosen by beam search in the layer's metric."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core import metrics
from jaxllm.core.arrays import as_stored
from jaxllm.core.spec import expression
from jaxllm.core.stats import output_energy
from jaxllm.core.vectors import start_tables
from jaxllm.core.weights import OutputTransformed, Scale, Vectors

TOGETHER = 256  # outputs whose beams are in memory at once


@expression
def additive(
    length: int = 8,
    bits: int = 8,
    stages: int = 2,
    metric=metrics.gram(),
    rounds: int = 4,
    beams: int = 4,
    steps: int = 30,
):
    """W = s_o sum_m C_m[code_m]: vectors of inputs as sums of learned entries (AQLM).

    Per output, with T = W / s_o, codes, codebooks and scales take turns in falling
    tr((W - Q)T H (W - Q)): codes by a beam search over all vectors and stages,
    codebooks by ``steps`` of conjugate gradients on what is a least squares problem,
    scales in closed form (arXiv:2401.06118, section 3; codebooks there by Adam).
    K-means on residuals starts. Codebooks and scales are stored in bfloat16.
    """
    if min(length, stages, beams, steps) < 1 or rounds < 0 or not 1 <= bits <= 8:
        raise ValueError(
            f"length {length}, bits {bits}, stages {stages}, rounds {rounds}, beams "
            f"{beams}, steps {steps}; accepted: bits 1 to 8, rounds 0, others 1 or more"
        )

    def solve(w, stats, key=None, support=None) -> OutputTransformed:
        if support is not None:
            raise TypeError("additive codebooks cannot keep a sparse support")
        short = -len(w) % length
        dense = jnp.pad(w.astype(jnp.float32), ((0, short), (0, 0)))
        h = jnp.pad(metric(stats, len(w)).full(), ((0, short), (0, short)))
        h = h / jnp.diagonal(h).mean()
        scale = as_stored(jnp.maximum(jnp.sqrt((dense**2).mean(0)), 1e-12))
        cost = jnp.maximum(jnp.diagonal(h), 0.0).reshape(-1, length) + 1e-6
        key = jax.random.key(0) if key is None else key
        plan = stages, bits, 30
        tables, codes = start_tables(dense / scale[None], cost, plan, key)
        for _ in range(rounds):
            codes = beam_codes(dense / scale[None], h, tables, codes, beams)
            tables = as_stored(fitted_tables(dense, h, scale, tables, codes, steps))
            scale = as_stored(_fitted_scale(dense, h, decoded(tables, codes), scale))
        codes = beam_codes(dense / scale[None], h, tables, codes, beams)
        packed = jnp.transpose(codes, (2, 1, 0)).astype(jnp.uint8)
        table = tables.astype(jnp.bfloat16)
        made = Vectors.encode(packed, table, bits, len(w), w.dtype)
        return OutputTransformed(Scale(scale.astype(jnp.bfloat16)), made)

    return solve


def decoded(
    tables: Float[Array, "stage entries length"],
    codes: Int[Array, "vectors out stage"],
) -> Float[Array, "in out"]:
    """Sums of the entries that codes name."""
    parts = [table[codes[..., m]] for m, table in enumerate(tables)]
    return jnp.swapaxes(sum(parts[1:], parts[0]), 1, 2).reshape(-1, codes.shape[1])


def error(w, h, scale, tables, codes) -> Float[Array, ""]:
    """tr((W - Q)T H (W - Q))."""
    return output_energy(h, w - decoded(tables, codes) * scale[None])


def fitted_tables(w, h, scale, tables, codes, steps: int):
    """The codebooks of least error for given codes, by conjugate gradients.

    The error is quadratic in the tables: its gradient is linear in them.
    """
    slope = jax.grad(lambda t: error(w, h, scale, t, codes))
    start, linear = jax.linearize(slope, tables)
    change = jax.scipy.sparse.linalg.cg(linear, -start, maxiter=steps)[0]
    return tables + change


def _fitted_scale(w, h, q, scale):
    """s_o = w_oT H q_o / q_oT H q_o, the least error for given codes and tables."""
    turned = h @ q
    most = (q * turned).sum(0)
    found = (w * turned).sum(0) / jnp.maximum(most, 1e-12)
    return jnp.where((most > 1e-12) & (found > 0), found, scale)


def beam_codes(
    goal: Float[Array, "in out"],
    h: Float[Array, "in in"],
    tables: Float[Array, "stage entries length"],
    codes: Int[Array, "vectors out stage"],
    beams: int,
) -> Int[Array, "vectors out stage"]:
    """Codes after one beam search per output: never worse than those given.

    Vector by vector and stage by stage, each beam tries all entries for that code,
    and the ``beams`` best of all stay. With R = H (t - q), exchanging entry c for c'
    (d = c' - c) in vector j changes the error by dT H_jj d - 2 dT R_j.
    """

    def one(pair):
        t, own = pair
        return _beam(t, own, h, tables, beams)

    rows = goal.T, jnp.swapaxes(codes, 0, 1)
    return jnp.swapaxes(jax.lax.map(one, rows, batch_size=TOGETHER), 0, 1)


def _beam(t, codes, h, tables, beams: int):
    """Codes [vectors, stage] of one output t [in]."""
    stages, entries, length = tables.shape

    def step(i, state):
        codes, left, loss = state
        j, m = i // stages, i % stages
        here = jax.lax.dynamic_slice_in_dim(left, j * length, length, 1)
        columns = jax.lax.dynamic_slice_in_dim(h, j * length, length, 1)
        own = jax.lax.dynamic_slice_in_dim(columns, j * length, length, 0)
        table = tables[m]
        change = table[None] - table[codes[:, j, m]][:, None]
        gain = 2 * jnp.einsum("bkl,bl->bk", change, here)
        price = jnp.einsum("bkl,lc,bkc->bk", change, own, change)
        total = (loss[:, None] + price - gain).ravel()
        least, best = jax.lax.top_k(-total, beams)
        parent, entry = best // entries, best % entries
        codes = codes[parent].at[:, j, m].set(entry)
        left = left[parent] - change[parent, entry] @ columns.T
        return codes, left, -least

    difference = t - decoded(tables, codes[:, None])[:, 0]
    left = h @ difference
    start = jnp.where(jnp.arange(beams) == 0, difference @ left, jnp.inf)
    spread = lambda x: jnp.repeat(x[None], beams, 0)  # noqa: E731
    state = spread(codes), spread(left), start
    return jax.lax.fori_loop(0, len(codes) * stages, step, state)[0][0]
