"""Decode attention on Hopper: what one thread block does with its share of the slots.

Names are those of the inputs (``k_scale``) and, with ``_s``, of the stages of the ring
in shared memory that they pass through; ``_d`` are floats made of codes.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels import online_softmax as online
from pallas_kernels.decode_attention import gpu_codes
from pallas_kernels.decode_attention.gpu_codes import WGMMA, Channels
from pallas_kernels.decode_attention.gpu_plan import TILE, Plan, Tuning
from pallas_kernels.online_softmax import LOG2E, LOWEST

BY_SLOT, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


def kernel(plan: Plan, tuning, names, *refs, q_s, p_s, o_s, q_full, full, **staged):
    """One share of the slots of one sequence and key head."""
    ins = dict(zip(names, refs, strict=False))
    out, *left = refs[len(names) :]
    batch, group, split = (lax.axis_index(a) for a in ("batch", "group", "split"))
    stages, length = tuning.stages, ins["lengths"][batch]
    begin, steps = _share(plan, tuning, length, split)
    own = {name: ins[name].at[batch, group] for name in ("q", "factor", "less",
           "whole") if name in ins}  # fmt: skip
    queries = _start_queries(plan, own, q_s, q_full)
    place = functools.partial(_place, plan, ins, batch, begin, steps)
    fetch = functools.partial(_fetch, plan, tuning, ins, staged, full, group)
    side = functools.partial(_side, plan, ins, batch, group)
    nothing = lax.shift_right_logical(length, 31)  # lengths are not negative
    floats = functools.partial(
        gpu_codes.floats, nothing=nothing, interpret=plan.interpret
    )
    for i in range(stages):
        pl.when(i < steps)(lambda i=i: fetch(i, place(i)))

    def step(i, carry):
        (acc, peak, totals, shifts), ahead, sides = carry
        at = lax.rem(i, stages)
        later = side(place(i + 1))
        plgpu.barrier_wait(full.at[at])
        s = _scores(plan, staged, at, q_s, queries, floats)
        s = _scaled(plan, s, sides, queries)
        s = _logits(plan, s, queries["factor"], begin + i, length)
        if plan.sums:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged["s_s"][...] = s
        new = jnp.maximum(peak, s.max(axis=0))
        p, alpha = jnp.exp2(s - _across(new, s.shape)), jnp.exp2(peak - new)
        totals = totals * _across(alpha, s.shape) + p
        shares = _shares(plan, p, sides, p_s.dtype)
        for n, zero in enumerate(sides.get("v_zero", ())):
            zero = online.rows_to(zero - float(plan.values.middle), s.shape)
            taken = shares[n].astype(jnp.float32) * zero
            shifts[n] = shifts[n] * _across(alpha, s.shape) + taken
        compat.transposed(p_s)[...] = plgpu.layout_cast(
            _joined(plan, shares, 1, WGMMA), plgpu.Layout.WGMMA_TRANSPOSED
        )
        v = staged["v_s"].at[at]
        if plan.values is not None:
            codes = compat.load(v, WGMMA)
            v = staged["v_d"]
            v[...] = floats(codes, plan.values.bits, middle=True)
        plgpu.commit_smem()
        if plan.sums:
            here = left[0].at[batch, group, pl.ds((begin + i) * TILE, TILE)]
            plgpu.copy_smem_to_gmem(staged["s_s"], here)
        wide = _joined(plan, [alpha] * plan.mixes, 0, BY_COLUMN)
        acc = online.accumulate(
            acc * _across(wide, acc.shape),
            compat.transposed(v),
            compat.transposed(p_s),
            plan.interpret,
        )
        pl.when(i + stages < steps)(lambda: fetch(i + stages, ahead))
        return (acc, new, totals, shifts), place(i + stages + 1), later

    carry = _start(plan), place(stages), side(place(0))
    (acc, peak, totals, shifts), _, _ = lax.fori_loop(0, steps, step, carry)
    o_s[pl.ds(0, plan.width)] = _own_blocks(plan, acc)
    rows = [peak, *(by_slot.sum(axis=0) for by_slot in (totals, *shifts))]
    for n, row in enumerate(rows):
        o_s[plan.width + n] = row
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_s, out.at[batch, group, split])
    plgpu.wait_smem_to_gmem(0)


def _across(values, shape):
    """One value per column, down the rows."""
    return lax.broadcast_in_dim(values, shape, [1])


def _joined(plan: Plan, arrays, axis: int, layout):
    return gpu_codes.joined(arrays, axis, layout, interpret=plan.interpret)


def _start(plan: Plan):
    """Empty sums [width, columns], peaks [columns], and by slot totals and shifts."""
    zeros = lambda rows, columns: plgpu.layout_cast(  # noqa: E731
        jnp.zeros((rows, columns), jnp.float32), WGMMA
    )
    lowest = jnp.full((plan.columns,), LOWEST, jnp.float32)
    shifts = plan.mixes if plan.values is not None and plan.values.zeros else 0
    return (
        zeros(plan.width, plan.mixes * plan.columns),
        plgpu.layout_cast(lowest, BY_COLUMN),
        zeros(TILE, plan.columns),
        [zeros(TILE, plan.columns) for _ in range(shifts)],
    )


def _start_queries(plan: Plan, own, q_s, q_full) -> dict:
    """The queries in shared memory, or to be scaled in registers; factors and sums."""
    read = functools.partial(compat.load, optimized=False)
    out = {"factor": read(own["factor"], BY_COLUMN)}
    for name in ("less", "whole"):
        if name in own:
            blocks = range(plan.products)
            out[name] = [read(own[name].at[b], BY_COLUMN) for b in blocks]
    if plan.channels:
        channels = Channels.of(plan.keys.bits, plan.width)
        at = [pl.ds(j * channels.words, channels.words) for j in range(channels.places)]
        out["q"] = [read(own["q"].at[:, here], channels.pair) for here in at]
        return out
    plgpu.copy_gmem_to_smem(own["q"], q_s, q_full)
    plgpu.barrier_wait(q_full)
    return out


def _share(plan: Plan, tuning: Tuning, length, split):
    """The first tile of this share and how many tiles it has."""
    last = lax.div(jnp.minimum(length, plan.slots) + (TILE - 1), TILE)
    first = jnp.int32(0)
    if plan.window is not None:
        first = lax.div(jnp.maximum(length - plan.window, 0), TILE)
    each = lax.div(last - first + (tuning.splits - 1), tuning.splits)
    begin = first + split * each
    steps = jnp.maximum(jnp.minimum(each, last - begin), 0)
    # An empty share may begin past the end, where there is nothing to read ahead.
    return jnp.minimum(begin, jnp.maximum(last - 1, 0)), steps


def _place(plan: Plan, ins, batch, begin, steps, i):
    """Where a step's slots are: cache rows, the tile within them and of the sequence.

    Read ahead of its use; past the end it repeats the last step, or the first.
    """
    tile = begin + jnp.maximum(jnp.minimum(i, steps - 1), 0)
    if plan.page is None:
        return (batch,), tile, tile
    table = ins["pages"]
    if plan.page >= TILE:
        per = plan.page // TILE
        at = jnp.minimum(lax.div(tile, per), table.shape[1] - 1)
        return (table[batch, at],), lax.rem(tile, per), tile
    ids = [jnp.minimum(tile * plan.copies + j, table.shape[1] - 1)
           for j in range(plan.copies)]  # fmt: skip
    return tuple(table[batch, i] for i in ids), jnp.int32(0), tile


def _fetch(plan: Plan, tuning, ins, staged, full, group, i, place):
    """Start the copies of a step's keys and values, and of scales per channel."""
    rows, tile, _ = place
    at = lax.rem(i, tuning.stages)
    for name, (height, slots) in plan.ring.items():
        size = height // plan.copies
        first = tile * height if slots <= TILE else lax.div(tile, slots // TILE)
        for j, row in enumerate(rows):
            source = ins[name].at[row, pl.ds(first, size), group]
            target = staged[f"{name}_s"].at[at, pl.ds(j * size, size)]
            plgpu.copy_gmem_to_smem(source, target, full.at[at])


def _side(plan: Plan, ins, batch, group, place) -> dict:
    """A step's scales and zeros per slot, by block, in registers and float32."""
    ((row, *_), tile, whole), out = place, {}
    if plan.gathered:
        row, tile = batch, whole
    slots, ring = pl.ds(tile * TILE, TILE), plan.ring
    for name, ref in ins.items():
        if name.endswith(("_scale", "_zero")) and name not in ring:
            at = [ref.at[row, slots, group, b] for b in range(ref.shape[3])]
            values = [compat.load(ref, BY_SLOT, optimized=False) for ref in at]
            out[name] = [value.astype(jnp.float32) for value in values]
    return out


def _shares(plan: Plan, p, sides, dtype) -> list:
    """The probabilities as the values want them: times the scales of each block."""
    if plan.values is None:
        return [p.astype(dtype)]
    scales = sides["v_scale"]
    return [(p * online.rows_to(scale, p.shape)).astype(dtype) for scale in scales]


def _scores(plan: Plan, staged, at, q_s, queries, floats):
    """k q^T [TILE, products columns] for the keys of a step, float32."""
    tile = staged["k_s"].at[at]
    if plan.keys is None:
        return online.scores((tile,), (q_s,))
    codes = compat.load(tile, WGMMA)
    if plan.channels:
        q_s[...] = _scaled_queries(plan, staged, at, queries["q"])
        plgpu.commit_smem()
    k = floats(codes, plan.keys.bits, middle=plan.channels)
    if plan.depth > plan.width:
        ones = jnp.ones((TILE, plan.depth - plan.width), k.dtype)
        k = _joined(plan, [k, plgpu.layout_cast(ones, WGMMA)], 1, WGMMA)
    if plan.interpret:  # its wgmma takes no operand from registers
        staged["k_d"][...] = k
        plgpu.commit_smem()
        k = staged["k_d"]

    def product(acc):
        plgpu.wgmma(acc, k, compat.transposed(q_s))
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((TILE, q_s.shape[0]), jnp.float32))


def _scaled_queries(plan: Plan, staged, at, q):
    """The queries times the scales of each block's channels, [products columns, depth].

    Then, to meet ones, minus the sums over places of those times the zero points.
    """
    form, blocks = plan.keys, []
    channels = Channels.of(form.bits, plan.width)

    def by_place(name, b):
        ref = staged[f"{name}_s"].at[at, b]
        whole = compat.load(ref, channels.whole, optimized=False)
        parts = channels.parts(whole, interpret=plan.interpret)
        return [part.astype(jnp.float32) for part in parts]

    for b in range(plan.products):
        scaled = [
            each * channels.over_heads(scale, plan.columns)
            for each, scale in zip(q, by_place("k_scale", b), strict=True)
        ]
        parts = [each.astype(jnp.float16) for each in scaled]
        if form.zeros:
            zeros = [
                channels.over_heads(float(form.middle) - zero, plan.columns)
                for zero in by_place("k_zero", b)
            ]
            parts.append(_zero_sums(form, scaled, zeros))
        blocks.append(_joined(plan, parts, 1, channels.pair))
    return _joined(plan, blocks, 0, channels.pair)


def _zero_sums(form, scaled, less):
    """Over places, the sums of scaled queries times (middle code - zero)."""
    by_low = {}
    for low, own, each in zip(gpu_codes.lows(form.bits), scaled, less, strict=True):
        taken = own * each
        by_low[low] = by_low[low] + taken if low in by_low else taken
    total, *others = (taken * 2.0**low for low, taken in by_low.items())
    return sum(others, total).astype(jnp.float16)


def _scaled(plan: Plan, s, sides, queries):
    """One score for each slot and query head, [TILE, columns], from all products."""
    columns = plan.columns
    parts = [s[:, n * columns : (n + 1) * columns] for n in range(plan.products)]
    if plan.keys is None:
        return s
    if plan.channels:
        s, slots = parts[0], plan.keys.slots
        if len(parts) > 1:
            slot = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=WGMMA)
        for n, part in enumerate(parts[1:], 1):
            s = jnp.where(slot >= n * slots, part, s)
        return s
    shape = (TILE, columns)
    for n, less in enumerate(queries["less"]):
        parts[n] = parts[n] - _across(less, shape)
    for n, zero in enumerate(sides.get("k_zero", ())):
        whole = _across(queries["whole"][n], shape)
        parts[n] = parts[n] - online.rows_to(zero, shape) * whole
    scales = [online.rows_to(scale, shape) for scale in sides["k_scale"]]
    return sum(a * b for a, b in zip(parts[1:], scales[1:], strict=True)) + (
        parts[0] * scales[0]
    )


def _logits(plan: Plan, s, factor, tile, length):
    """Scores [TILE, columns] in units of log 2; -inf for slots that are not seen."""
    s = s * _across(factor, s.shape)
    if plan.soft_cap is not None:
        s = jnp.tanh(s) * (plan.soft_cap * LOG2E)
    slot = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=WGMMA)
    slot = slot + tile * TILE
    seen = slot < jnp.minimum(length, plan.slots)
    if plan.window is not None:
        seen = seen & (slot >= length - plan.window)
    return jnp.where(seen, s, -jnp.inf)


def _own_blocks(plan: Plan, acc):
    """Of the sums [width, mixes columns], each channel's for its own block's scales."""
    if plan.mixes == 1:
        return acc
    columns, form = plan.columns, plan.values
    words = plan.width // form.places
    parts = [acc[:, n * columns : (n + 1) * columns] for n in range(plan.mixes)]
    row = plgpu.broadcasted_iota(jnp.int32, parts[0].shape, 0, layout=WGMMA)
    word, out = lax.rem(row, jnp.full_like(row, words)), parts[0]
    for n, part in enumerate(parts[1:], 1):
        out = jnp.where(word >= n * (words // plan.mixes), part, out)
    return out
