"""Hopper: values and mask from memory to registers, where they become dense operands.

Decode is bound by memory, so that what counts is what is read: the kept values, or
their codes, and a bit for each input. The tensor core multiplies the zeros too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_plan, hopper_ring
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Stream, Tuning
from pallas_kernels.hopper_ring import Place, Product, Ring
from pallas_kernels.hopper_term import Term
from pallas_kernels.nm_matmul import fragments
from pallas_kernels.nm_matmul.reference import check
from pallas_kernels.quantized_matmul.fragments import HALVES, WORDS, permute

__all__ = ["Tuning", "default_tuning", "nm_matmul"]

STEP = 256  # inputs: 32 bytes of the mask
CHUNK = 64  # inputs whose values and flags a thread's registers hold as whole words


@dataclasses.dataclass(frozen=True)
class Plan(hopper_plan.Plan):
    """All that is static about one call."""

    m: int
    bits: int | None
    zero: str  # "none", "integer" or "float"

    @property
    def width(self) -> int:
        """Inputs of a group of a step."""
        return self.tuning.inputs // self.groups


def nm_matmul(
    x,
    mask,
    values,
    scale=None,
    zero=None,
    low_rank=None,
    *,
    n: int,
    m: int,
    bits: int | None = None,
    block: int | None = None,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.nm_matmul`` for 2:4 and 4:8 on Hopper's tensor cores.

    Sums are float32. x and values are multiplied in bfloat16: wider x, and float32
    values that meet it, as two terms, high and low. Scales are rounded to bfloat16 for
    many rows of bfloat16. ``low_rank`` as in ``quantized_matmul``. NotImplementedError
    for other patterns, codes but of 4 bits, inputs that are no multiple of 256, outputs
    of 64, or blocks of neither.
    """
    hopper.require(interpret)
    check(x, mask, values, scale, zero, low_rank, n, m, bits, block)
    inputs, outputs = x.shape[-1], len(mask)
    narrow, stored = x.dtype == jnp.bfloat16, values if bits is None else values[0]
    if not x.size:
        return jnp.zeros((*x.shape[:-1], outputs), x.dtype)
    refuse(inputs, outputs, (n, m), bits, block, stored.dtype)
    terms = hopper.terms(x)
    if tuning is None:
        size = stored.shape[1] * stored.dtype.itemsize / inputs
        tuning = default_tuning(len(terms), inputs, outputs, block, size, not narrow)
    many = jnp.pad(terms, ((0, -len(terms) % tuning.rows), (0, 0)))
    kind = "none"
    if zero is not None:
        kind = "integer" if jnp.issubdtype(zero.dtype, jnp.integer) else "float"
    whole = None if block == inputs else block
    plan = Plan(len(many), inputs, outputs, whole, narrow, tuning, m, bits, kind)
    columns = stored.shape[1] * STEP // inputs
    streams = (
        [Stream(permute(many, fragments.TILES), STEP, 2 * CHUNK)],
        [
            Stream(stored, columns, columns * stored.dtype.itemsize),
            Stream(mask, STEP // 8, STEP // 8),
        ],
    )
    plan, term, beside = Term.of(x, low_rank, plan, streams)
    product = Product(
        plan,
        *streams,
        [a for a in (scale, zero) if a is not None],
        functools.partial(_consume, plan),
        [CHUNK],
        term,
    )
    return hopper.joined(product.run(interpret), x, outputs, beside)


def refuse(inputs, outputs, pattern, bits, block, dtype) -> None:
    """NotImplementedError with the reason for what the kernel cannot serve."""
    n, m = pattern
    if pattern not in fragments.PATTERNS:
        raise NotImplementedError(f"{n}:{m} sparsity; this kernel has 2:4 and 4:8")
    if bits not in (None, 4):
        raise NotImplementedError(
            f"values of {bits} bits; this kernel has 4 and floats"
        )
    if bits is None and dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{dtype} values; accepted: bfloat16 and float32")
    if outputs % LANES or inputs % STEP:
        raise NotImplementedError(
            f"{outputs} outputs of {inputs} inputs; accepted are multiples of {LANES} "
            f"and {STEP}"
        )
    whole = block is None or (block % STEP == 0 and inputs % block == 0)
    if not whole and (block % CHUNK or STEP % block):
        raise NotImplementedError(
            f"blocks of {block}; accepted: {CHUNK}, {2 * CHUNK}, or multiples of "
            f"{STEP} that divide the inputs"
        )


def default_tuning(rows, inputs, outputs, block, size, exact=False) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many.

    ``size`` is the bytes stored for an input beside its mask; ``exact`` keeps scales in
    float32 for many rows too.
    """
    blocks = 1 if block is None or block >= STEP else STEP // block
    most = 128 if not exact or block is None else 64 // blocks
    tile = next((r for r in (8, 16, 32, 64) if rows <= r <= most), most)
    steps = inputs // STEP
    warpgroups, split = hopper.spread(rows, tile, outputs, steps)
    lanes = LANES * warpgroups
    stage = 2 * tile * STEP + int(lanes * STEP * (size + 1 / 8))
    stages = hopper.depth(stage, lanes, tile, steps // split)
    return Tuning(tile, STEP, stages, split, warpgroups, exact or tile <= 32)


def _consume(plan: Plan, ring: Ring, others, place: Place):
    """The sums [64, rows] of this warpgroup over all steps, scaled."""
    rows, indices = pl.ds(place.row, LANES), range(plan.groups)

    def fetch(i):
        """Scales of the groups of step ``i``, and what is taken from their codes."""
        at = [plan.group(place.first + i, g) for g in indices]
        columns = [[hopper.column(ref, rows, g) for g in at] for ref in others]
        if plan.zero == "none":
            return columns
        base = fragments.MAGIC if plan.zero == "integer" else 0.0
        return columns[0], [fragments.twice(zero + base) for zero in columns[1]]

    multiply = functools.partial(_multiply, plan, ring, place)
    plain = functools.partial(multiply, scaled=False)
    if plan.block is None:
        total = hopper_ring.sums(plan, ring, fetch, plain, constant=True)
        if not others:
            return total
        return total * hopper.across(fetch(0)[0][0], plan.tuning.rows)
    if plan.tuning.sums:
        scales = lambda found: found[0]  # noqa: E731
        return hopper_ring.sums_of_blocks(plan, ring, fetch, plain, scales)
    scaled = functools.partial(multiply, scaled=True)
    return hopper_ring.sums(plan, ring, fetch, scaled, constant=False)


def _multiply(plan: Plan, ring: Ring, place: Place, accs, at, found, *, scaled) -> None:
    """accs[g] += W x^T of one step."""
    here = pl.ds(place.warpgroup * LANES, LANES)
    stored, mask = (tiles.at[at, here] for tiles in ring.w)
    flags, width = compat.load(mask, HALVES), plan.width
    tiles = _tiles(plan, stored, flags, found, interpret=ring.staged is not None)
    for group, tile in tiles:
        if scaled:
            by = found[0][group].astype(jnp.bfloat16)
            tile = tile * hopper.across(by, width)
        for start in range(0, width, CHUNK):
            part = tile[:, start : start + CHUNK]
            part = hopper_ring.operand(ring, 0, place, part)
            columns = pl.ds(group * width + start, CHUNK)
            inputs = ring.x[0].at[at, :, columns]
            plgpu.wgmma(accs[group], part, compat.transposed(inputs))


def _tiles(plan: Plan, stored, flags, found, *, interpret: bool):
    """(group, its dense tile): of floats as many as have terms, of codes one each."""
    expand = dict(m=plan.m, interpret=interpret)
    if plan.bits is None:
        layout = fragments.value_layout(stored.dtype.itemsize)
        # Threads of a warp meet in the same banks where values are float32.
        values = compat.load(stored, layout, optimized=stored.dtype == jnp.bfloat16)
        for term in _terms(values, plan.narrow):
            yield 0, fragments.from_floats(term, layout, flags, **expand)
        return
    codes, width = compat.load(stored, WORDS), plan.width
    for g in range(plan.groups):
        own = codes[:, g * width // 4 : (g + 1) * width // 4]
        bits = flags[:, g * width // 8 : (g + 1) * width // 8]
        shifts = _shifts(plan, found[1][g] if plan.zero != "none" else None)
        yield g, fragments.from_codes(own, shifts, bits, **expand)


def _shifts(plan: Plan, zero) -> list:
    """What is taken from 128 + code, a zero point of integers at once."""
    if plan.zero == "none":
        return [float(fragments.MAGIC + 2 ** (plan.bits - 1))]
    return [zero] if plan.zero == "integer" else [float(fragments.MAGIC), zero]


def _terms(values, narrow: bool):
    """Values as bfloat16, or as the high and the low term of float32."""
    if values.dtype == jnp.bfloat16:
        return [values]
    if narrow:
        return [values.astype(jnp.bfloat16)]
    bits = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return [high.astype(jnp.bfloat16), (values - high).astype(jnp.bfloat16)]
