"""Decode attention on Hopper: one query a sequence, the cache split over the machine.

A thread block is one warpgroup; it reads a share of one key head's slots, 64 a step,
through a ring of TMA copies, and two of them fit a multiprocessor. Products are taken
transposed, s^T = k q^T and o^T = v^T p^T: the 64 slots fill the tensor core's rows
and the query heads of a group its columns, of which 8 are enough (one query against
64 padded rows would spend 8 to 16 times the exponentials). Codes become float16
(exact: at most 8 bits, less their zero) in shared memory; scales per slot multiply
scores and probabilities. Codes at the same place of two bytes are neighbours there,
so q is permuted to match and the result back. Shares are merged outside (Flash
Decoding). Where column sums are asked for, the kernel leaves its scores behind (32
bytes a slot beside some hundreds read), which become probabilities when all shares'
peaks and totals are known.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels import online_softmax as online
from pallas_kernels.decode_attention.gpu_plan import (
    TILE,
    Plan,
    Tuning,
    check_served,
    default_tuning,
)
from pallas_kernels.decode_attention.reference import QuantizedCache, check
from pallas_kernels.online_softmax import LOG2E, LOWEST

STATISTICS = 16  # rows below the output: peak, total, padding to whole copies
HALF_1024 = 0x6400  # the bits of float16 1024; its low 10 bits count units of one


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

    Quantized caches have a scale (and zero) per slot. Shares of empty or short
    sequences cost nothing.
    """
    check(q, keys, values, lengths, pages, window)
    check_served(q, keys, values, pages, interpret)
    batch, heads, width = q.shape
    groups = keys.shape[2]
    page = None if pages is None else keys.shape[1]
    slots = keys.shape[1] if pages is None else pages.shape[1] * page
    bits = [a.bits if isinstance(a, QuantizedCache) else None for a in (keys, values)]
    plan = Plan(
        tuning or default_tuning(batch * groups, slots, width, bits),
        width, page, *bits, soft_cap, window, sums, interpret,
    )  # fmt: skip
    scale = width**-0.5 if scale is None else scale
    queries, factor = _queries(plan, q.reshape(batch, groups, -1, width), scale)
    with online.running(interpret):
        shares, *scores = _call(plan, queries, factor, lengths, pages, keys, values)
    out, logs = _merge(plan, shares, sinks, heads // groups)
    out = out.reshape(q.shape).astype(q.dtype)
    if not sums:
        return out
    return out, _column_sums(scores[0][:, :, :slots], logs, lengths, window)


def _queries(plan: Plan, q, scale: float):
    """q [batch, groups, columns, width] for the kernel, and what its scores lack.

    For codes it is float16 with a power of two taken out, permuted as the codes are.
    """
    factor = jnp.ones((*q.shape[:3], 1), jnp.float32)
    if plan.key_bits is not None:
        wide = q.astype(jnp.float32)
        largest = jnp.abs(wide).max(-1, keepdims=True)
        factor = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(largest, 2.0**-60))))
        per = 16 // plan.key_bits
        q = (wide / factor).reshape(*q.shape[:3], -1, per).swapaxes(-1, -2)
        q = (q * _digits(plan.key_bits)).reshape(wide.shape).astype(jnp.float16)
    unit = LOG2E if plan.soft_cap is None else 1.0 / plan.soft_cap
    columns = (0, -q.shape[2] % 8)
    q = jnp.pad(q, ((0, 0), (0, 0), columns, (0, 0)))
    factor = factor[..., 0] * (scale * unit)
    return q, jnp.pad(factor, ((0, 0), (0, 0), columns))


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
    out = (acc * weight[..., None]).sum(2)
    total = jnp.where(total == 0.0, 1.0, total)
    out, logs = out / total[..., None], top + jnp.log2(total)
    if plan.value_bits is None:
        return out, logs
    per = 16 // plan.value_bits
    parts = out.reshape(*out.shape[:3], per, -1) * _digits(plan.value_bits)
    return parts.swapaxes(-1, -2).reshape(out.shape), logs


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


def _digits(bits: int):
    """[digits of two bytes, 1]: what makes up for the place of each in its byte."""
    return 2.0 ** -(bits * jnp.arange(16.0 // bits)[:, None] % 8)


def _call(plan: Plan, q, factor, lengths, pages, keys, values):
    """[batch, groups, splits, width + STATISTICS, columns] in float32.

    With sums also the scores [batch, groups, slots in whole tiles, columns].
    """
    batch, groups, columns, width = q.shape
    operands = {"q": q, "factor": factor, "lengths": lengths}
    if pages is not None:
        operands["pages"] = pages.astype(jnp.int32)
    stages, staged = plan.tuning.stages, {}
    swizzles = []
    for name, cache in (("k", keys), ("v", values)):
        codes = isinstance(cache, QuantizedCache)
        tile = _words(cache.codes) if codes else cache
        operands[name] = tile
        staged[f"{name}_s"] = online.tiles((stages, TILE, tile.shape[3]), tile.dtype)
        swizzles.append(min(128, 2 * tile.shape[3]) if codes else 128)
        if codes:
            operands[f"{name}_scale"] = cache.scale
            if cache.zero is not None:
                operands[f"{name}_zero"] = cache.zero
            staged[f"{name}_d"] = online.tiles((TILE, width), jnp.float16, swizzles[-1])
    half = jnp.float16 if plan.value_bits else values.dtype
    shapes = [(plan.tuning.splits, width + STATISTICS, columns)]
    if plan.sums:
        slots = keys.shape[1] if pages is None else pages.shape[1] * plan.page
        shapes.append((-(-slots // TILE) * TILE, columns))
        staged["s_s"] = plgpu.SMEM((TILE, columns), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, plan, tuple(operands)),
        out_type=tuple(
            jax.ShapeDtypeStruct((batch, groups, *shape), jnp.float32)
            for shape in shapes
        ),
        grid=(groups, plan.tuning.splits, batch),
        grid_names=("group", "split", "batch"),
        scratch_types={
            **staged,
            "q_s": online.tiles((columns, width), q.dtype, swizzles[0]),
            "p_s": online.tiles((columns, TILE), half, swizzles[1]),
            "o_s": plgpu.SMEM((width + STATISTICS, columns), jnp.float32),
            "q_full": plgpu.Barrier(),
            "full": plgpu.Barrier(num_arrivals=2 * plan.copies, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())


def _kernel(plan: Plan, names, *refs, q_s, p_s, o_s, q_full, full, **staged):
    """One share of the slots of one sequence and key head."""
    ins = dict(zip(names, refs, strict=False))
    out, *left = refs[len(names) :]
    batch, group, split = (lax.axis_index(a) for a in ("batch", "group", "split"))
    stages, columns = plan.tuning.stages, q_s.shape[0]
    length = ins["lengths"][batch]
    begin, steps = _share(plan, length, split)
    plgpu.copy_gmem_to_smem(ins["q"].at[batch, group], q_s, q_full)
    factor = compat.load(
        ins["factor"].at[batch, group], plgpu.Layout.WGMMA.reduce(0), optimized=False
    )
    place = functools.partial(_place, plan, ins, batch, begin, steps)
    fetch = functools.partial(_fetch, plan, ins, staged, full, group)
    side = functools.partial(_side, ins, group)
    for i in range(stages):
        pl.when(i < steps)(lambda i=i: fetch(i, place(i)))
    plgpu.barrier_wait(q_full)

    def step(i, carry):
        (acc, peak, totals), ahead, sides = carry
        at = lax.rem(i, stages)
        plgpu.barrier_wait(full.at[at])
        s = online.scores((_tile("k", plan.key_bits, staged, at, sides),), (q_s,))
        s = _logits(plan, s, sides, factor, begin + i, length)
        if plan.sums:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged["s_s"][...] = s
        new = jnp.maximum(peak, s.max(axis=0))
        p, alpha = jnp.exp2(s - _across(new, s.shape)), jnp.exp2(peak - new)
        totals = totals * _across(alpha, s.shape) + p
        if "v_scale" in sides:
            p = p * online.rows_to(sides["v_scale"], p.shape)
        compat.transposed(p_s)[...] = plgpu.layout_cast(
            p.astype(p_s.dtype), plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        if plan.sums:
            here = left[0].at[batch, group, pl.ds((begin + i) * TILE, TILE)]
            plgpu.copy_smem_to_gmem(staged["s_s"], here)
        v = _tile("v", plan.value_bits, staged, at, sides)
        acc = acc * _across(alpha, acc.shape)
        acc = online.accumulate(
            acc, compat.transposed(v), compat.transposed(p_s), plan.interpret
        )
        pl.when(i + stages < steps)(lambda: fetch(i + stages, ahead))
        return (acc, new, totals), place(i + stages + 1), side(place(i + 1))

    carry = _start(plan, columns), place(stages), side(place(0))
    (acc, peak, totals), _, _ = lax.fori_loop(0, steps, step, carry)
    o_s[pl.ds(0, plan.width)] = acc
    o_s[plan.width] = peak
    o_s[plan.width + 1] = totals.sum(axis=0)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_s, out.at[batch, group, split])
    plgpu.wait_smem_to_gmem(0)


def _across(values, shape):
    """One value per column, down the rows."""
    return lax.broadcast_in_dim(values, shape, [1])


def _start(plan: Plan, columns: int):
    """Empty sums [width, columns], peaks [columns], totals by slot [TILE, columns]."""
    wide, narrow = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)
    acc = plgpu.layout_cast(jnp.zeros((plan.width, columns), jnp.float32), wide)
    peak = plgpu.layout_cast(jnp.full((columns,), LOWEST, jnp.float32), narrow)
    return acc, peak, plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), wide)


def _share(plan: Plan, length, split):
    """The first tile of this share and how many tiles it has."""
    last = lax.div(length + (TILE - 1), TILE)
    first = jnp.int32(0)
    if plan.window is not None:
        first = lax.div(jnp.maximum(length - plan.window, 0), TILE)
    splits = plan.tuning.splits
    each = lax.div(last - first + (splits - 1), splits)
    begin = first + split * each
    return begin, jnp.maximum(jnp.minimum(each, last - begin), 0)


def _place(plan: Plan, ins, batch, begin, steps, i):
    """Where a step's slots are: cache rows, and the tile within them.

    Read ahead of its use; past the end it repeats the last step, or the first.
    """
    tile = begin + jnp.maximum(jnp.minimum(i, steps - 1), 0)
    if plan.page is None:
        return (batch,), tile
    table = ins["pages"]
    if plan.page >= TILE:
        per = plan.page // TILE
        at = jnp.minimum(lax.div(tile, per), table.shape[1] - 1)
        return (table[batch, at],), lax.rem(tile, per)
    ids = [jnp.minimum(tile * plan.copies + j, table.shape[1] - 1)
           for j in range(plan.copies)]  # fmt: skip
    return tuple(table[batch, i] for i in ids), jnp.int32(0)


def _fetch(plan: Plan, ins, staged, full, group, i, place):
    """Start the copies of a step's keys and values."""
    rows, tile = place
    at, size = lax.rem(i, plan.tuning.stages), TILE // plan.copies
    for name in "kv":
        for j, row in enumerate(rows):
            source = ins[name].at[row, pl.ds(tile * TILE, size), group]
            target = staged[f"{name}_s"].at[at, pl.ds(j * size, size)]
            plgpu.copy_gmem_to_smem(source, target, full.at[at])


def _side(ins, group, place):
    """A step's scales and zeros, one per slot, in registers and float32."""
    (row, *_), tile = place
    slots = pl.ds(tile * TILE, TILE)
    return {
        name: compat.load(
            ref.at[row, slots, group, 0], plgpu.Layout.WGMMA.reduce(1), optimized=False
        ).astype(jnp.float32)
        for name, ref in ins.items()
        if name.endswith(("_scale", "_zero"))
    }


def _tile(name: str, bits: int | None, staged, at, sides):
    """A step's keys or values [TILE, width] in shared memory, ready for wgmma.

    A digit stays in its place of the byte, so it counts 2^place times.
    """
    tile = staged[f"{name}_s"].at[at]
    if bits is None:
        return tile
    dense, words = staged[f"{name}_d"], tile.shape[1]
    codes = compat.load(tile, plgpu.Layout.WGMMA)
    zero = sides.get(f"{name}_zero", float(2 ** (bits - 1)))
    for j in range(16 // bits):
        if j * bits == 8:
            codes = lax.shift_right_logical(codes, jnp.full_like(codes, 8))
        place = j * bits % 8
        digit = codes & jnp.uint16((2**bits - 1) << place)
        value = lax.bitcast_convert_type(digit | jnp.uint16(HALF_1024), jnp.float16)
        less = zero * 2.0**place + 1024.0
        if isinstance(less, float):
            value = value - jnp.float16(less)
        else:
            value = value - online.rows_to(less.astype(jnp.float16), value.shape)
        dense[:, pl.ds(j * words, words)] = value
    plgpu.commit_smem()
    return dense


def _words(planes):
    """Codes two bytes at a time, [..., width bits / 16]; moves nothing."""
    (plane,) = planes
    return lax.bitcast_convert_type(plane.reshape(*plane.shape[:-1], -1, 2), jnp.uint16)


def _logits(plan: Plan, s, sides, factor, tile, length):
    """Scores [TILE, columns] in units of log 2; -inf for slots that are not seen."""
    if "k_scale" in sides:
        s = s * online.rows_to(sides["k_scale"], s.shape)
    s = s * _across(factor, s.shape)
    if plan.soft_cap is not None:
        s = jnp.tanh(s) * (plan.soft_cap * LOG2E)
    slot = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
    slot = slot + tile * TILE
    seen = slot < length
    if plan.window is not None:
        seen = seen & (slot >= length - plan.window)
    return jnp.where(seen, s, -jnp.inf)
