"""Vector quantization: codebooks by weighted k-means, assignment with compensation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.arrays import as_stored
from jaxllm.core.spec import expression
from jaxllm.core.sweep import upper_factor
from jaxllm.core.weights import Transposed, Vectors


@expression
def vectors(
    length: int,
    bits: int,
    stages: int = 1,
    metric=metrics.gram(),
    steps: int = 30,
    compensate: bool = True,
    across: bool = False,
):
    """Vectors of ``length`` neighbours become sums of codebook entries.

    Neighbours are inputs of an output, or with ``across`` outputs of an input.
    Codebooks of 2^bits entries serve the whole matrix: k-means on all vectors, each
    coordinate weighted by H_ii, then on what is left. Inputs (groups of them) are
    assigned in turn, nearest under H_ii, which all outputs share; with ``compensate``
    later inputs absorb the error: W_rest -= U_b,restT U_bb^-T (W_b - Q_b) (GPTVQ,
    arXiv:2402.15319, section 3.2; ``across``: VPTQ, arXiv:2409.17066, section 3.1).
    """
    if length < 1 or stages < 1 or not 1 <= bits <= 8:
        raise ValueError(f"length {length}, bits {bits}, stages {stages}: 1, 1..8, 1")

    rows, columns = (1, length) if across else (length, 1)

    def solve(w, stats, key=None, support=None) -> Vectors | Transposed:
        if support is not None:
            raise TypeError("codebook vectors cannot keep a sparse support")
        found = metric(stats, len(w))
        short = -len(w) % rows
        sides = ((0, short), (0, -w.shape[1] % columns))
        dense = jnp.pad(w.astype(jnp.float32), sides)
        cost = jnp.pad(found.importance, (0, short)).reshape(-1, rows)
        cost = jnp.broadcast_to(cost / cost.mean() + 1e-6, (len(cost), length))
        key = jax.random.key(0) if key is None else key
        points = _cut(dense, rows, columns)
        tables = _codebooks(points, cost, (stages, bits, steps), key)

        def assign(i, outputs):
            """Codes [stage, vectors], values [out, rows] of ``outputs`` [out, rows]."""
            codes, near = _assigned(outputs.reshape(-1, length), tables, cost[i])
            return codes, near.reshape(outputs.shape)

        if compensate:
            codes = sweep_vectors(dense, upper_factor(found.full()), rows, assign)
        else:
            codes = jax.vmap(assign)(jnp.arange(len(cost)), points)[0]
        codes, stored = codes.astype(jnp.uint8), tables.astype(jnp.bfloat16)
        if across:
            codes = jnp.swapaxes(codes, 0, 1)
            return Transposed(
                Vectors.encode(codes, stored, bits, w.shape[1], str(w.dtype))
            )
        codes = jnp.moveaxis(codes, 0, -1)
        return Vectors.encode(codes, stored, bits, len(w), w.dtype)

    return solve


def _cut(w, rows: int, columns: int = 1):
    """[in, out] as [groups, vectors, length] of ``rows`` inputs by ``columns``."""
    turned = jnp.swapaxes(w.reshape(-1, rows, w.shape[1]), 1, 2)
    return turned.reshape(len(turned), -1, rows * columns)


def _codebooks(points, cost, plan, key):
    """Tables [stage, entries, length] for points [vectors, out, length]."""
    stages, bits, steps = plan
    flat = points.reshape(-1, points.shape[-1])
    weight = jnp.repeat(cost, points.shape[1], 0)
    rest, tables = flat, []
    for stage in range(stages):
        table = _lloyd(rest, weight, 2**bits, steps, jax.random.fold_in(key, stage))
        tables.append(table)
        rest = rest - table[_nearest(rest, table, weight)]
    return jnp.stack(tables)


def start_tables(w, cost, plan, key):
    """Tables for ``w`` [in, out] by residual k-means, and codes [vectors, out, stage].

    ``cost`` [vectors, length] weighs the coordinates; ``plan`` is (stages, bits,
    steps).
    """
    points = _cut(w, cost.shape[1])
    tables = _codebooks(points, cost, plan, key)
    codes = jax.vmap(_assigned, (0, None, 0))(points, tables, cost)[0]
    return tables, jnp.swapaxes(codes, 1, 2)


def _lloyd(points, weight, count: int, steps: int, key):
    """Weighted k-means; entries are those that bfloat16 can store."""
    score = (weight * points**2).sum(1) + 1e-12
    start = jax.random.choice(key, len(points), (count,), p=score / score.sum())

    def step(_, table):
        near = _nearest(points, table, weight)
        mass = jax.ops.segment_sum(weight, near, count)
        total = jax.ops.segment_sum(weight * points, near, count)
        return jnp.where(mass > 0, total / jnp.maximum(mass, 1e-12), table)

    table = jax.lax.fori_loop(0, steps, step, points[start])
    return as_stored(table)


def _nearest(points, table, weight):
    """argmin_k sum weight (x - c_k)^2, without the points' own squares."""
    cross = (weight * points) @ table.T
    return (weight @ (table**2).T - 2 * cross).argmin(1)


def _assigned(points, tables, cost):
    """(codes [stage, out], sums [out, length]) of vectors [out, length]."""
    weight = jnp.broadcast_to(cost, points.shape)
    rest, codes = points, []
    for table in tables:
        near = _nearest(rest, table, weight)
        codes.append(near)
        rest = rest - table[near]
    return jnp.stack(codes), points - rest


def sweep_vectors(w, u, length: int, assign):
    """Codes of all vectors [vectors, ...]; later inputs absorb each one's error.

    ``assign(i, rows)`` gives codes and values [out, length] of vector i. With U of
    ``upper_factor``, W_rest -= U_b,restT U_bb^-T (W_b - Q_b): LDLQ in blocks. ``w``
    has whole vectors; inputs beyond those of ``u`` only fill the last.
    """
    short = len(w) - len(u)
    filling = jnp.where(jnp.arange(len(w)) < len(u), 0.0, 1.0)
    u = jnp.pad(u, ((0, short), (0, short))) + jnp.diag(filling)

    def one(i, state):
        w, codes = state
        start = i * length
        here = jax.lax.dynamic_slice_in_dim(w, start, length, 0)
        found, q = assign(i, here.T)
        rows = jax.lax.dynamic_slice_in_dim(u, start, length, 0)
        own = jax.lax.dynamic_slice_in_dim(rows, start, length, 1)
        error = jax.scipy.linalg.solve_triangular(own, here - q.T, trans="T")
        later = jnp.where((jnp.arange(len(w)) >= start + length)[None], rows, 0.0)
        store = lambda all_, new: all_.at[i].set(new)  # noqa: E731
        return w - later.T @ error, jax.tree.map(store, codes, found)

    count = len(w) // length
    shapes = jax.eval_shape(assign, 0, w[:length].T)[0]
    blank = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, count, one, (w, blank))[1]
