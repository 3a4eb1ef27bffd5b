"""Attention over lists of key blocks on Hopper: one warpgroup fetches, two compute.

A thread block owns 128 query rows of a head. Its two compute warpgroups share one list
of key blocks (block_q >= 128) or follow one each (block_q = 64); the third fetches the
listed key and value tiles by TMA into a ring per list. The rows' running softmax stays
in registers, probabilities go straight into the second product as its left operand
(FlashAttention-3, arXiv:2407.08608), and with a shared list the two take turns on the
tensor cores. Lists ascend, so tiles that need the causal mask come last: how many tiles
need none, and how many are visible at all, is counted outside the kernel.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels import online_softmax as online
from pallas_kernels.online_softmax import LOG2E, ROWS

WARPGROUPS = 2  # that compute
SHARED_MEMORY = 220 * 1024  # of a multiprocessor's 227 KB, barriers aside


@dataclasses.dataclass(frozen=True)
class Tuning:
    """``tile`` keys a step, and ``stages`` steps in flight for each list."""

    tile: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is specialised for."""

    tuning: Tuning
    block_q: int
    block_k: int
    keys: int
    offset: int  # position of query 0
    causal: bool
    scale: float
    soft_cap: float | None
    window: int | None
    extra: tuple[str, ...]  # of "mine", "theirs" (ids of documents) and "sinks"
    interpret: bool

    @property
    def lists(self) -> int:
        """Lists that a thread block follows."""
        return WARPGROUPS if self.block_q == ROWS else 1

    @property
    def rows(self) -> int:
        """Query rows that follow one list in one thread block."""
        return ROWS * WARPGROUPS // self.lists

    @property
    def parts(self) -> int:
        """Tiles of a key block."""
        return self.block_k // self.tuning.tile


def default_tuning(width: int, block_q: int, block_k: int, itemsize: int = 2) -> Tuning:
    """The largest tile of which two stages fit beside the queries."""
    lists = WARPGROUPS if block_q == ROWS else 1
    left = SHARED_MEMORY - WARPGROUPS * ROWS * width * itemsize
    for tile in (128, 64):
        stages = left // (lists * 2 * tile * width * itemsize)
        if block_k % tile == 0 and stages >= 2:
            return Tuning(tile, min(stages, 4))
    raise NotImplementedError(
        f"heads of width {width}: two stages exceed shared memory"
    )


def attend(q, k, v, index, count, *, block_q, block_k, causal, scale, soft_cap,
           window: int | None = None, segments=None, sinks=None,
           tuning: Tuning | None = None, interpret: bool = False):  # fmt: skip
    """softmax(q k^T) v over listed key blocks; what ``block_sparse_attention`` means.

    Axes of ``index`` and ``count`` may have length one, for lists that are shared.
    ``window``, ``segments`` and ``sinks`` are those of ``flash_attention``.
    """
    online.check_dtypes(q, k, v, interpret=interpret)
    width = q.shape[3]
    scale = width**-0.5 if scale is None else scale
    _check_served(block_q, block_k, scale)
    extra = {}
    if segments is not None:
        extra["mine"] = _documents(segments[0], ROWS * WARPGROUPS, -1)
        extra["theirs"] = _documents(segments[1], block_k, -2)
    if sinks is not None:
        extra["sinks"] = sinks.astype(jnp.float32) * LOG2E
    plan = Plan(
        tuning or default_tuning(-(-width // 64) * 64, block_q, block_k),
        block_q,
        block_k,
        keys=k.shape[1],
        offset=k.shape[1] - q.shape[1],
        causal=causal,
        scale=scale,
        soft_cap=soft_cap,
        window=window,
        extra=tuple(extra),
        interpret=interpret,
    )
    wide = _padded(q, ROWS * WARPGROUPS), *(_padded(a, block_k) for a in (k, v))
    bounds = tile_bounds(plan, index, count, wide[0].shape[1])
    with online.running(interpret):
        out = _call(plan, *wide, index.astype(jnp.int32), bounds, *extra.values())
    return out[:, : q.shape[1], :, :width]


def _check_served(block_q: int, block_k: int, scale: float) -> None:
    if block_q != ROWS and block_q % (ROWS * WARPGROUPS):
        raise NotImplementedError(
            f"query blocks of {block_q}; the kernel takes 64 and multiples of 128"
        )
    if block_k % 64:
        raise NotImplementedError(
            f"key blocks of {block_k}; the kernel takes multiples of 64"
        )
    if not scale > 0:
        raise NotImplementedError(f"scale {scale}; the kernel takes positive ones")


def _documents(ids, block: int, padding: int):
    """Ids of whole blocks; 0, which sees and shows nothing, becomes ``padding``."""
    ids = jnp.where(ids == 0, padding, ids).astype(jnp.int32)
    tail = -ids.shape[1] % block
    return jnp.pad(ids, ((0, 0), (0, tail)), constant_values=padding)


def _padded(a, block: int):
    """Whole blocks of positions, and a head width that fills the swizzled rows."""
    tail, side = -a.shape[1] % block, -a.shape[3] % 64
    if not tail and not side:
        return a
    return jnp.pad(a, ((0, 0), (0, tail), (0, 0), (0, side)))


def tile_bounds(plan: Plan, index, count, queries: int):
    """[batch, heads, queries / rows, 2]: tiles without a mask, and visible tiles.

    Both are prefixes, since a list ascends. Documents and windows mask every tile.
    """
    tile, parts = plan.tuning.tile, plan.parts
    first = jnp.arange(0, queries, plan.rows)
    row = jnp.minimum(first // plan.block_q, index.shape[2] - 1)
    starts = index[:, :, row, :, None] * plan.block_k
    starts = starts + jnp.arange(parts, dtype=index.dtype) * tile
    listed = jnp.arange(index.shape[3]) < count[:, :, row, None]
    first = (first + plan.offset)[:, None, None]
    whole, visible = starts + tile <= plan.keys, starts < plan.keys
    if plan.window is not None or "mine" in plan.extra:
        whole = jnp.zeros_like(whole)
    if plan.causal:
        whole &= starts + tile - 1 <= first
        visible &= starts <= first + plan.rows - 1
    masks = jnp.stack((whole, visible), -1) & listed[..., None, None]
    return masks.sum((3, 4), dtype=jnp.int32)


def _call(plan: Plan, q, k, v, index, bounds, *extra):
    batch, queries, heads, width = q.shape
    tile, ring = plan.tuning.tile, plan.lists * plan.tuning.stages
    scratch = {
        "q_s": online.tiles((WARPGROUPS, ROWS, width), q.dtype),
        "k_s": online.tiles((ring, tile, width), k.dtype),
        "v_s": online.tiles((ring, tile, width), v.dtype),
        "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_full": plgpu.Barrier(num_barriers=ring),
        "v_full": plgpu.Barrier(num_barriers=ring),
        "k_free": _free(plan, ring),
        "v_free": _free(plan, ring),
        "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }
    if plan.interpret:
        scratch["p_s"] = online.tiles((WARPGROUPS, ROWS, tile), v.dtype)
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, queries // (ROWS * WARPGROUPS), batch),
        grid_names=("head", "rows", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, index, bounds, *extra)


def _free(plan: Plan, ring: int):
    return plgpu.Barrier(num_arrivals=WARPGROUPS // plan.lists, num_barriers=ring)


def _kernel(plan, q, k, v, index, bounds, *rest, p_s=None, **scratch):
    """One thread block: warpgroup 2 fetches, warpgroups 0 and 1 compute."""
    me = lax.axis_index("warpgroup")
    extra, out = dict(zip(plan.extra, rest[:-1], strict=True)), rest[-1]
    pl.when(me < WARPGROUPS)(
        lambda: _compute(plan, q, index, bounds, extra, out, me, p_s, **scratch)
    )
    pl.when(me == WARPGROUPS)(lambda: _fetch(plan, q, k, v, index, bounds, **scratch))


def _place():
    """(batch, head, first row tile of 128) of this thread block."""
    return tuple(lax.axis_index(name) for name in ("batch", "head", "rows"))


def _shared(ref, *indices):
    """An element of a table whose axes may be short: the last serves the rest."""
    return ref[
        tuple(jnp.minimum(i, n - 1) for i, n in zip(indices, ref.shape, strict=True))
    ]


def _tile_id(plan: Plan, index, list_, step):
    """The tile of keys that a step of a list attends to."""
    batch, head, rows = _place()
    first = rows * (ROWS * WARPGROUPS) + list_ * plan.rows
    row = lax.div(first, plan.block_q)
    block = _shared(index, batch, head, row, lax.div(step, plan.parts))
    return block * plan.parts + lax.rem(step, plan.parts)


def _fetch(plan: Plan, q, k, v, index, bounds, *, k_s, v_s, k_full, v_full, k_free,
           v_free, **_):  # fmt: skip
    """Keep each list's ring of key and value tiles full."""
    plgpu.set_max_registers(40, action="decrease")
    batch, head, rows = _place()
    group = lax.div(head, q.shape[2] // k.shape[2])
    tile, stages = plan.tuning.tile, plan.tuning.stages
    lists = range(plan.lists)
    live = [_shared(bounds, batch, head, rows * plan.lists + i, 1) for i in lists]

    def tile_of(i, step):
        """Fetched a step ahead; past the end it repeats the last, or the first."""
        return _tile_id(plan, index, i, jnp.maximum(jnp.minimum(step, live[i] - 1), 0))

    def advance(step, ids):
        slot = lax.rem(step, stages)
        for i in lists:

            @pl.when(step < live[i])
            def _(keys=pl.ds(ids[i] * tile, tile), i=i):
                at = (batch, keys, group)
                here = i * stages + slot
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[here]))
                plgpu.copy_gmem_to_smem(k.at[at], k_s.at[here], k_full.at[here])
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[here]))
                plgpu.copy_gmem_to_smem(v.at[at], v_s.at[here], v_full.at[here])

        return tuple(tile_of(i, step + 1) for i in lists)

    lax.fori_loop(0, functools.reduce(jnp.maximum, live), advance,
                  tuple(tile_of(i, 0) for i in lists))  # fmt: skip


def _compute(plan: Plan, q, index, bounds, extra, out, me, p_s, *, q_s, q_full, k_s,
             v_s, k_full, v_full, k_free, v_free, turn):  # fmt: skip
    """64 query rows against the visible tiles of their list."""
    plgpu.set_max_registers(232, action="increase")
    batch, head, rows = _place()
    stages = plan.tuning.stages
    list_ = me if plan.lists > 1 else 0
    mine = pl.ds((rows * WARPGROUPS + me) * ROWS, ROWS)
    unit = rows * plan.lists + list_
    full, live = (_shared(bounds, batch, head, unit, i) for i in range(2))
    queries = q_s.at[me]
    plgpu.copy_gmem_to_smem(q.at[batch, mine, head], queries, q_full.at[me])
    plgpu.barrier_wait(q_full.at[me])
    swap = functools.partial(_swap, turn) if plan.lists == 1 else None
    hide = functools.partial(_mask, plan, *_documents_of(extra, batch, mine))

    def step(i, state, masked):
        slot = list_ * stages + lax.rem(i, stages)
        plgpu.barrier_wait(k_full.at[slot])
        s = online.scores((queries,), (k_s.at[slot],), swap)
        plgpu.barrier_arrive(k_free.at[slot])
        s, factor = online.logits(s, plan.scale, plan.soft_cap)
        if masked:
            s = hide(s, (rows * WARPGROUPS + me) * ROWS + plan.offset,
                      _tile_id(plan, index, list_, i) * plan.tuning.tile)  # fmt: skip
        p, (acc, peak, total) = online.update(s, factor, state)
        half = p.astype(v_s.dtype)
        total = total + p.sum(axis=1)
        acc, peak, total, half = lax.optimization_barrier((acc, peak, total, half))
        if swap:
            plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_full.at[slot])
        if swap:
            plgpu.barrier_wait(turn)
        acc = online.values(*acc, half, v_s.at[slot], p_s and p_s.at[me])
        plgpu.barrier_arrive(v_free.at[slot])
        return (acc,), peak, total

    if swap:
        pl.when(me == 1)(swap)
    sink = extra["sinks"][head] if "sinks" in extra else None
    state = online.start(q.shape[3], first=sink)
    state = lax.fori_loop(0, full, functools.partial(step, masked=False), state)
    state = lax.fori_loop(full, live, functools.partial(step, masked=True), state)
    if swap:
        pl.when(me == 0)(swap)
    (acc,), _, total = state
    queries[...] = online.normalized(acc, total).astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, out.at[batch, mine, head])
    plgpu.wait_smem_to_gmem(0)


def _swap(turn) -> None:
    """Hand the tensor cores to the other warpgroup and wait for them."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _documents_of(extra, batch, rows):
    """The ids of this warpgroup's queries, and those of all keys of the sequence."""
    if "mine" not in extra:
        return None, None
    mine = extra["mine"].at[batch, rows]
    return _ids(mine, 1), extra["theirs"].at[batch]


def _ids(ref, axis: int):
    return compat.load(ref, plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _mask(plan: Plan, mine, theirs, s, query, key):
    """-inf where a key is past the sequence, its query, the window or the document."""
    iota = functools.partial(
        plgpu.broadcasted_iota, jnp.int32, s.shape, layout=plgpu.Layout.WGMMA
    )
    keys, queries = iota(1) + key, iota(0) + query
    seen = keys < plan.keys
    if plan.causal:
        seen = seen & (keys <= queries)
    if plan.window is not None:
        seen = seen & (keys > queries - plan.window)
        if not plan.causal:
            seen = seen & (keys < queries + plan.window)
    if mine is not None:
        own = lax.broadcast_in_dim(mine, s.shape, [0])
        other = _ids(theirs.at[pl.ds(key, s.shape[1])], 0)
        seen = seen & (own == lax.broadcast_in_dim(other, s.shape, [1]))
    return jnp.where(seen, s, -jnp.inf)
