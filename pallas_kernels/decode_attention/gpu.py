"""Decode attention on Hopper: one query a sequence, the cache split over the machine.

A thread block is one warpgroup; it reads a share of one key head's slots, 64 a step,
through a ring of TMA copies, and two or three of them fit a multiprocessor. Products
are taken transposed, s^T = k q^T and o^T = v^T p^T: the 64 slots fill the tensor core's
rows and the query heads of a group its columns, of which 8 are enough (one query
against 64 padded rows would spend 8 to 16 times the exponentials). Shares are merged
outside (Flash Decoding). Where column sums are asked for, the kernel leaves its scores
behind (32 bytes a slot beside some hundreds read), which become probabilities when all
shares' peaks and totals are known.

Codes become float16 less their middle (exact), keys in the registers that the tensor
core takes as its left operand and values, which it needs transposed, in shared memory.
Scales are never spread over codes:
* of a slot: they multiply its scores, or its probabilities. With several blocks of
  channels there are as many copies of the queries, zero outside their block, and of
  the probabilities, side by side in the columns of one product.
* of a channel, for a block of slots (KIVI, arXiv:2402.02750): they multiply the queries
  of that block, in registers, when its scales arrive with its codes. The sums over
  zero points ride along as further elements that meet ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import online_softmax as online
from pallas_kernels.decode_attention import gpu_codes
from pallas_kernels.decode_attention.gpu_kernel import kernel
from pallas_kernels.decode_attention.gpu_plan import (
    STATISTICS,
    TILE,
    Plan,
    Tuning,
    check_served,
    codes_of,
)
from pallas_kernels.decode_attention.reference import check, gathered, slots_of
from pallas_kernels.online_softmax import LOG2E

ROOM = 2.0**4  # centres float16's range on queries times scales


def decode_attention(
    q,
    keys,
    values,
    lengths,
    pages=None,
    sinks=None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    sums: bool = False,
    tuning: Tuning | None = None,
    interpret: bool = False,
):
    """See the reference. Caches in q's 16-bit dtype, or codes of 8, 4, 2 or 1 bits.

    Scales (and zeros) are per slot, or per slot and block of channels; of keys also
    per channel of so many slots. Those are multiplied in float16 into queries that are
    at most 1: of a scale above 4000 the result is not finite, and below 1e-6 it loses
    digits. Shares of empty or short sequences cost nothing.
    """
    lengths = check(q, keys, values, lengths, pages, sinks, window)
    check_served(q, keys, values, pages, interpret)
    batch, heads, width = q.shape
    groups = keys.shape[2]
    page = None if pages is None else keys.shape[1]
    slots = slots_of(keys, pages)
    columns = -(-heads // groups // 8) * 8
    plan = Plan(
        width, columns, page, slots, codes_of(keys), codes_of(values), soft_cap, window,
        sums, interpret,
    )  # fmt: skip
    tuning = tuning or plan.default_tuning(batch * groups, slots)
    scale = width**-0.5 if scale is None else scale
    inputs = _queries(plan, q.reshape(batch, groups, -1, width), scale)
    inputs["lengths"] = lengths
    if pages is not None:
        inputs["pages"] = pages.astype(jnp.int32)
    inputs |= _cache("k", plan, keys, pages) | _cache("v", plan, values, pages)
    with online.running(interpret):
        shares, *scores = _call(plan, tuning, inputs, slots)
    out, logs = _merge(plan, shares, sinks, heads // groups)
    out = out.reshape(q.shape).astype(q.dtype)
    if not sums:
        return out
    return out, _column_sums(scores[0][:, :, :slots], logs, lengths, window)


def _queries(plan: Plan, q, scale: float) -> dict:
    """q [batch, groups, heads, width] for the kernel, and what its scores lack.

    For codes it has a power of two taken out and the order of the codes. ``less`` is
    what the floats of codes give too much, ``whole`` the sums over the channels of each
    block, for zero points.
    """
    columns = ((0, 0), (0, 0), (0, plan.columns - q.shape[2]))
    factor, form, out = jnp.ones(q.shape[:3], jnp.float32), plan.keys, {}
    if form is not None:
        largest = jnp.abs(q.astype(jnp.float32)).max(-1)
        factor = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(largest, 2.0**-60))))
        q = gpu_codes.in_order(q.astype(jnp.float32) / factor[..., None], form.bits)
        worth = gpu_codes.worth(form.bits)
        q = jnp.pad(q * worth, (*columns, (0, 0), (0, 0)))
        if plan.channels:
            q, factor = q * ROOM, factor / ROOM
        else:
            q = q.astype(jnp.float16)
            block = jnp.arange(form.blocks)[:, None]
            own = jnp.arange(q.shape[-1])[None] * form.blocks // q.shape[-1] == block
            q = q[:, :, None] * own[:, None, None].astype(q.dtype)
            wide, middle = q.astype(jnp.float32), 0 if form.zeros else form.middle
            out["less"] = (wide * (1024.0 + middle / worth)).sum((-1, -2))
            if form.zeros:
                out["whole"] = (wide / worth).sum((-1, -2))
        q = q.reshape(*q.shape[:2], -1, plan.width)
    else:
        q = jnp.pad(q, (*columns, (0, 0)))
    unit = LOG2E if plan.soft_cap is None else 1.0 / plan.soft_cap
    return {"q": q, "factor": jnp.pad(factor * (scale * unit), columns), **out}


def _cache(name: str, plan: Plan, cache, pages) -> dict:
    """The arrays of a cache; scales per slot in whole tiles that can be read alone."""
    form = codes_of(cache)
    if form is None:
        return {name: cache}
    out = {name: gpu_codes.words(cache.codes), f"{name}_scale": cache.scale}
    if form.zeros:
        out[f"{name}_zero"] = cache.zero
    for key in (f"{name}_scale", f"{name}_zero"):
        if key in out and form.per_channel:
            if plan.width * out[key].dtype.itemsize % 128:  # the least that is copied
                out[key] = out[key].astype(jnp.bfloat16)
        elif key in out:
            each = gathered(out[key], pages) if plan.gathered else out[key]
            short = -each.shape[1] % TILE
            out[key] = jnp.pad(each, ((0, 0), (0, short), (0, 0), (0, 0)))
    return out


def _merge(plan: Plan, shares, sinks, heads: int):
    """[batch, groups, heads, width] from the shares' sums, peaks and totals.

    Also the logarithms (base 2) of the sums over all slots, [batch, groups, heads].
    """
    shares = shares.swapaxes(-1, -2)[..., :heads, :]
    acc, peak = shares[..., : plan.width], shares[..., plan.width]
    total, top = shares[..., plan.width + 1], peak.max(2)
    if sinks is not None:
        logits = sinks.astype(jnp.float32).reshape(1, -1, heads) * LOG2E
        top = jnp.maximum(top, logits)
    weight = jnp.exp2(peak - top[:, :, None])
    total = (total * weight).sum(2)
    if sinks is not None:
        total = total + jnp.exp2(logits - top)
    total = jnp.where(total == 0.0, 1.0, total)
    logs, weight = top + jnp.log2(total), weight[..., None]
    out, form = (acc * weight).sum(2), plan.values
    if form is not None:
        parts = out.reshape(*out.shape[:3], form.places, -1)
        parts = parts * gpu_codes.worth(form.bits)
        out = parts.swapaxes(-1, -2).reshape(out.shape)
        if form.zeros:
            first = plan.width + 2
            shift = shares[..., first : first + form.blocks]
            shift = (shift * weight).sum(2)
            out = out - jnp.repeat(shift, plan.width // form.blocks, -1)
    return out / total[..., None], logs


def _column_sums(scores, logs, lengths, window: int | None):
    """float32 [batch, groups, slots]: probabilities added over the heads of a group."""
    slot, length = jnp.arange(scores.shape[2])[None], lengths[:, None]
    seen = slot < length
    if window is not None:
        seen = seen & (slot >= length - window)
    own = scores[..., : logs.shape[2]]
    # Tiles that no share has read hold anything.
    return jnp.where(
        seen[:, None], jnp.exp2(own - logs[:, :, None]).sum(-1), jnp.float32(0)
    )


def _call(plan: Plan, tuning: Tuning, inputs: dict, slots: int):
    """[batch, groups, splits, width + STATISTICS, columns] in float32.

    With sums also the scores [batch, groups, slots in whole tiles, columns].
    """
    batch, groups = inputs["q"].shape[:2]
    columns, staged = plan.columns, {}
    for name, (rows, _) in plan.ring.items():
        array = inputs[name]
        memory = online.tiles if name in "kv" else plgpu.SMEM
        shape = tuning.stages, rows, array.shape[3]
        staged[f"{name}_s"] = memory(shape, array.dtype)
    swizzle = {
        name: 128 if form is None else min(128, 2 * inputs[name].shape[3])
        for name, form in (("k", plan.keys), ("v", plan.values))
    }
    halves = [inputs["k"].dtype, inputs["v"].dtype]
    for i, form in enumerate((plan.keys, plan.values)):
        halves[i] = jnp.float16 if form is not None else halves[i]
    if plan.values is not None:
        shape = (TILE, plan.width)
        staged["v_d"] = online.tiles(shape, jnp.float16, swizzle["v"])
    if plan.keys is not None and plan.interpret:
        staged["k_d"] = plgpu.SMEM((TILE, plan.depth), jnp.float16)
    shapes = [(tuning.splits, plan.width + STATISTICS, columns)]
    if plan.sums:
        shapes.append((-(-slots // TILE) * TILE, columns))
        staged["s_s"] = plgpu.SMEM((TILE, columns), jnp.float32)
    queries = (plan.products * columns, plan.depth)
    return plgpu.kernel(
        functools.partial(kernel, plan, tuning, tuple(inputs)),
        out_type=tuple(
            jax.ShapeDtypeStruct((batch, groups, *shape), jnp.float32)
            for shape in shapes
        ),
        grid=(groups, tuning.splits, batch),
        grid_names=("group", "split", "batch"),
        scratch_types={
            **staged,
            "q_s": online.tiles(queries, halves[0], swizzle["k"]),
            "p_s": online.tiles((plan.mixes * columns, TILE), halves[1], swizzle["v"]),
            "o_s": plgpu.SMEM((plan.width + STATISTICS, columns), jnp.float32),
            "q_full": plgpu.Barrier(),
            "full": plgpu.Barrier(
                num_arrivals=len(plan.ring) * plan.copies, num_barriers=tuning.stages
            ),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
