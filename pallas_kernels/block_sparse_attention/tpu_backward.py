"""TPU backward kernels: dq walks the lists of keys, dk and dv the transposed lists."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.blocks import block_index
from pallas_kernels.block_sparse_attention.reference import listed
from pallas_kernels.block_sparse_attention.stream import (
    Plan,
    dot,
    merged,
    positions,
    stream,
)

LANES = 128


def dq_kernel(plan: Plan, ids, q, do, sums, k_hbm, v_hbm, dq, acc, kb, vb, sem):
    """One query block of one head: dq = sum over its key blocks of ds k."""
    batch, head, row = (pl.program_id(i) for i in range(3))
    lanes = pl.ds(lax.div(head, plan.share) * plan.dim, plan.dim)
    acc[...] = jnp.zeros_like(acc)
    queries = lax.broadcasted_iota(jnp.int32, (plan.block_q, 1), 0)
    queries = queries + row * plan.block_q + plan.offset
    lse, delta = (column(sums[0, n : n + 1]) for n in range(2))

    def block_of(array):
        return lambda n: array.at[batch, pl.ds(n * plan.block_k, plan.block_k), lanes]

    def body(step, slot):
        k, keys = merged(kb, slot), positions(ids, step, plan.chunk_k, plan.block_k)
        s = plan.scores(q[0], k)
        p = jnp.exp(plan.mask(s, queries, keys) - lse)
        ds = p * (dot(do[0], merged(vb, slot), transpose=True) - delta) * plan.slope(s)
        acc[...] += dot(ds.astype(k.dtype), k)

    stream(ids, plan.chunk_k, (block_of(k_hbm), block_of(v_hbm)), (kb, vb), sem, body)
    dq[0] = acc[...].astype(dq.dtype)


def column(row):
    """[1, n] as [n, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def dkv_kernel(
    plan: Plan, rows, ids, k, v, q_hbm, do_hbm, sums_hbm, dk, dv, acc_k, acc_v,
    qb, dob, sumsb, sem,
):  # fmt: skip
    """One key block for one query head: over the query blocks that list it."""
    batch, head, row = (pl.program_id(i) for i in range(3))
    lanes = pl.ds(head * plan.dim, plan.dim)
    acc_k[...], acc_v[...] = jnp.zeros_like(acc_k), jnp.zeros_like(acc_v)
    keys = lax.broadcasted_iota(jnp.int32, (plan.block_k, 1), 0) + row * plan.block_k
    first = (batch * pl.num_programs(1) + head) * rows

    def block_of(array):
        return lambda n: array.at[batch, pl.ds(n * plan.block_q, plan.block_q), lanes]

    def body(step, slot):
        q, do = merged(qb, slot), merged(dob, slot)
        queries = positions(ids, step, plan.chunk_q, plan.block_q)
        held = queries < plan.block_q * rows
        lse, delta = (
            jnp.concatenate([sumsb[slot, i, n : n + 1] for i in range(plan.chunk_q)], 1)
            for n in range(2)
        )
        s = plan.scores(k[0], q)
        p = jnp.exp(plan.mask(s, queries + plan.offset, keys) - lse)
        p = jnp.where(held, p, 0.0)
        ds = p * (dot(v[0], do, transpose=True) - delta) * plan.slope(s)
        acc_v[...] += dot(p.astype(do.dtype), do)
        acc_k[...] += dot(ds.astype(q.dtype), q)

    sources = (block_of(q_hbm), block_of(do_hbm), lambda n: sums_hbm.at[first + n])
    stream(ids, plan.chunk_q, sources, (qb, dob, sumsb), sem, body)
    dk[0], dv[0] = acc_k[...].astype(dk.dtype), acc_v[...].astype(dv.dtype)


def gradients(plan: Plan, q, k, v, index, count, o, lse, do):
    """dq, dk, dv on fused arrays; the key heads' sums over their query heads."""
    heads = q.shape[2] // plan.dim
    split = lambda a: a.astype(jnp.float32).reshape(*a.shape[:2], heads, plan.dim)  # noqa: E731
    delta = jnp.einsum("bshd,bshd->bhs", split(o), split(do)).reshape(lse.shape)
    sums = jnp.concatenate((lse, delta), 1)
    dq = _dq(plan, q, do, sums, k, v, _flat(index, count))
    blocks = k.shape[1] // plan.block_k
    transposed = block_index(jnp.swapaxes(listed(index, count, blocks), 2, 3))
    dk, dv = _dkv(plan, q, do, sums, k, v, _flat(*transposed))
    return dq, _over_heads(plan, dk, k), _over_heads(plan, dv, v)


def _flat(index, count):
    lists = jnp.concatenate((count[..., None], index), -1).astype(jnp.int32)
    return lists.reshape(-1, 1, lists.shape[-1])


def _over_heads(plan: Plan, grad, like):
    each = grad.reshape(*grad.shape[:2], -1, plan.share, plan.dim)
    return each.sum(3, dtype=jnp.float32).reshape(like.shape).astype(like.dtype)


def _call(plan: Plan, kernel, grid, in_specs, out_specs, out_shape, scratch, name):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name=name,
    )


def _dq(plan: Plan, q, do, sums, k, v, lists):
    heads, rows = q.shape[2] // plan.dim, q.shape[1] // plan.block_q
    flat = lambda b, h, i: ((b * heads + h) * rows + i, 0, 0)  # noqa: E731
    block = pl.BlockSpec((1, plan.block_q, plan.dim), lambda b, h, i: (b, i, h))
    tile = (2, plan.chunk_k, plan.block_k, plan.dim)
    call = _call(
        plan,
        lambda *refs: dq_kernel(plan, *refs),
        (q.shape[0], heads, rows),
        [
            pl.BlockSpec((1, 1, lists.shape[-1]), flat, memory_space=pltpu.SMEM),
            block,
            block,
            pl.BlockSpec((1, 2, plan.block_q), flat),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        block,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [
            pltpu.VMEM((plan.block_q, plan.dim), jnp.float32),
            pltpu.VMEM(tile, k.dtype),
            pltpu.VMEM(tile, v.dtype),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        "block_sparse_attention_dq",
    )
    return call(lists, q, do, sums, k, v)


def _dkv(plan: Plan, q, do, sums, k, v, lists):
    heads, columns = q.shape[2] // plan.dim, k.shape[1] // plan.block_k
    rows = q.shape[1] // plan.block_q
    flat = lambda b, h, i: ((b * heads + h) * columns + i, 0, 0)  # noqa: E731
    shape = (1, plan.block_k, plan.dim)
    shared = pl.BlockSpec(shape, lambda b, h, i: (b, i, lax.div(h, plan.share)))
    own = pl.BlockSpec(shape, lambda b, h, i: (b, i, h))
    tile = (2, plan.chunk_q, plan.block_q, plan.dim)
    each = jax.ShapeDtypeStruct((*k.shape[:2], q.shape[2]), k.dtype)
    call = _call(
        plan,
        lambda *refs: dkv_kernel(plan, rows, *refs),
        (q.shape[0], heads, columns),
        [
            pl.BlockSpec((1, 1, lists.shape[-1]), flat, memory_space=pltpu.SMEM),
            shared,
            shared,
            *[pl.BlockSpec(memory_space=pl.ANY)] * 3,
        ],
        [own, own],
        [each, each],
        [
            pltpu.VMEM(shape[1:], jnp.float32),
            pltpu.VMEM(shape[1:], jnp.float32),
            pltpu.VMEM(tile, q.dtype),
            pltpu.VMEM(tile, do.dtype),
            pltpu.VMEM((2, plan.chunk_q, 2, plan.block_q), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 3)),
        ],
        "block_sparse_attention_dkv",
    )
    return call(lists, k, v, q, do, sums)
