"""TPU kernel: a program per query block walks its list of key blocks.

Splash attention needs the mask as an array of elements and block lists in scalar
memory, which hold neither 64k positions nor a list a head. Here a program's own list
is its scalar input and the keys come by explicit copies, so that a dropped block costs
nothing, no grid step either. Arrays keep their layout: a head is 128 lanes of the
fused [sequence, heads * dim].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import tpu_backward
from pallas_kernels.block_sparse_attention.reference import check_blocks
from pallas_kernels.block_sparse_attention.stream import (
    Plan,
    dot,
    merged,
    positions,
    stream,
)
from pallas_kernels.flash_attention.reference import NEGATIVE, check

LANES = 128
STEP = 512  # keys (or, backward, queries) that a step multiplies


def forward_kernel(
    plan: Plan, ids, q, k_hbm, v_hbm, o, lse, peak, total, acc, kb, vb, sem
):
    """One query block of one head: the online softmax over its listed key blocks."""
    batch, head, row = (pl.program_id(i) for i in range(3))
    lanes = pl.ds(lax.div(head, plan.share) * plan.dim, plan.dim)
    peak[...] = jnp.full_like(peak, NEGATIVE)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    queries = lax.broadcasted_iota(jnp.int32, (plan.block_q, 1), 0)
    queries = queries + row * plan.block_q + plan.offset

    def block_of(array):
        return lambda n: array.at[batch, pl.ds(n * plan.block_k, plan.block_k), lanes]

    def body(step, slot):
        keys = positions(ids, step, plan.chunk_k, plan.block_k)
        s = plan.mask(plan.scores(q[0], merged(kb, slot)), queries, keys)
        before = peak[:, :1]
        after = jnp.maximum(before, s.max(-1, keepdims=True))
        p, kept = jnp.exp(s - after), jnp.exp(before - after)
        total[...] = total[...] * kept + p.sum(-1, keepdims=True)
        acc[...] = acc[...] * kept + dot(p.astype(v_hbm.dtype), merged(vb, slot))
        peak[...] = jnp.broadcast_to(after, peak.shape)

    stream(ids, plan.chunk_k, (block_of(k_hbm), block_of(v_hbm)), (kb, vb), sem, body)
    seen = peak[...] > NEGATIVE / 2
    sums = jnp.where(seen, total[...], 1.0)
    o[0] = jnp.where(seen[:, :1], acc[...] / sums[:, :1], 0.0).astype(o.dtype)
    if lse is not None:  # a row that sees nothing: all of its shares come out as zero
        lse[0] = jnp.where(seen, peak[...] + jnp.log(sums), -NEGATIVE).T[:1]


def forward(plan: Plan, q, k, v, lists, residuals: bool):
    """o [batch, q, heads * dim] and, for the backward pass, log-sums a query block."""
    batch, length, width = q.shape
    heads, rows = width // plan.dim, length // plan.block_q
    flat = lambda b, h, i: ((b * heads + h) * rows + i, 0, 0)  # noqa: E731
    block = pl.BlockSpec((1, plan.block_q, plan.dim), lambda b, h, i: (b, i, h))
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out_specs = [block]
    if residuals:
        shape = (batch * heads * rows, 1, plan.block_q)
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        out_specs.append(pl.BlockSpec((1, *shape[1:]), flat))

    def kernel(ids, q, k, v, o, *rest):
        lse, rest = (rest[0], rest[1:]) if residuals else (None, rest)
        forward_kernel(plan, ids, q, k, v, o, lse, *rest)

    tile = (2, plan.chunk_k, plan.block_k, plan.dim)
    out = pl.pallas_call(
        kernel,
        grid=(batch, heads, rows),
        in_specs=[
            pl.BlockSpec((1, 1, lists.shape[-1]), flat, memory_space=pltpu.SMEM),
            block,
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((plan.block_q, LANES), jnp.float32),
            pltpu.VMEM((plan.block_q, LANES), jnp.float32),
            pltpu.VMEM((plan.block_q, plan.dim), jnp.float32),
            pltpu.VMEM(tile, k.dtype),
            pltpu.VMEM(tile, v.dtype),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name="block_sparse_attention",
    )(lists, q, k, v)
    return out if residuals else (out[0], None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q, k, v, index, count):
    """On fused arrays: q [batch, q, heads * dim], k and v [batch, kv, groups * dim]."""
    return forward(plan, q, k, v, flat_lists(index, count), False)[0]


def _attend_forward(plan: Plan, q, k, v, index, count):
    o, lse = forward(plan, q, k, v, flat_lists(index, count), True)
    return o, (q, k, v, index, count, o, lse)


def _attend_backward(plan: Plan, saved, do):
    q, k, v, index, count, o, lse = saved
    grads = tpu_backward.gradients(plan, q, k, v, index, count, o, lse, do)
    return *grads, None, None


attend.defvjp(_attend_forward, _attend_backward)


def flat_lists(index, count):
    """int32[batch * heads * rows, 1, 1 + width]: each row's count, then its blocks."""
    lists = jnp.concatenate((count[..., None], index), -1).astype(jnp.int32)
    return lists.reshape(-1, 1, lists.shape[-1])


def fused(x, block: int):
    """[batch, n, heads, dim] as [batch, whole blocks, heads * whole lanes]."""
    short = (-x.shape[1] % block, -x.shape[3] % LANES)
    if any(short):
        x = jnp.pad(x, ((0, 0), (0, short[0]), (0, 0), (0, short[1])))
    return x.reshape(*x.shape[:2], -1)


def block_sparse_attention(
    q, k, v, index, count, *, block_q: int, block_k: int, causal=True, scale=None,
    soft_cap=None, interpret=False,
):  # fmt: skip
    """The reference's arguments; short blocks and lanes are padded."""
    check(q, k, v)
    check_blocks(q, k, index, count, block_q=block_q, block_k=block_k)
    if block_q % 16 or block_k % 16:
        raise NotImplementedError(f"blocks {block_q} x {block_k}: not multiples of 16")
    batch, length, heads, dim = q.shape
    plan = Plan(
        block_q=block_q,
        block_k=block_k,
        share=heads // k.shape[2],
        dim=-(-dim // LANES) * LANES,
        keys=k.shape[1],
        offset=k.shape[1] - length,
        causal=causal,
        scale=dim**-0.5 if scale is None else scale,
        soft_cap=soft_cap,
        chunk_q=max(1, STEP // block_q),
        chunk_k=min(index.shape[-1], max(1, STEP // block_k)),
        interpret=interpret,
    )
    arrays = fused(q, block_q), fused(k, block_k), fused(v, block_k)
    out = attend(plan, *arrays, index, count)
    return out.reshape(batch, -1, heads, plan.dim)[:, :length, :, :dim]
