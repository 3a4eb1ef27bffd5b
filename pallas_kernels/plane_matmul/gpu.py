"""Hopper: signs and trits of two bits become operands by a look-up of constants.

The planes of a weight meet the same x. For few rows each plane's sums over a block are
scaled in float32; for many the scaled planes are added first, and multiplied once.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_plan, hopper_ring
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Stream, Tuning
from pallas_kernels.hopper_ring import Place, Product, Ring
from pallas_kernels.plane_matmul.gpu_trits import trit_matmul
from pallas_kernels.plane_matmul.reference import block_sums, check, places
from pallas_kernels.quantized_matmul import fragments, gpu_plan

__all__ = ["Tuning", "default_tuning", "plane_matmul"]

STEP = 32  # bytes of a plane, so that operands of many inputs wait in few registers
IN_FLIGHT = 4  # places in the byte whose operands do
# What the codes of a kind are worth (two's complement; -2 does not occur).
LEVELS = {"binary": (-1.0, 1.0), "ternary": (0.0, 1.0, -2.0, -1.0)}


@dataclasses.dataclass(frozen=True)
class Plan(hopper_plan.Plan):
    """All that is static about one call: ``count`` planes of ``part`` bits."""

    count: int
    part: int
    levels: tuple[float, ...]

    @property
    def bytes(self) -> int:
        """Of a plane's row in a step."""
        return self.tuning.inputs * self.part // 8

    @property
    def width(self) -> int:
        """Bytes of a group of a step."""
        return self.bytes // self.groups


def plane_matmul(
    x,
    planes,
    scales,
    bias=None,
    *,
    kind: str,
    block: int | None,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.plane_matmul`` on Hopper's tensor cores.

    Sums are float32; the bias acts on the sums of x over each block, outside. x is
    multiplied in bfloat16: wider x as two terms, high and low. For many rows of
    bfloat16 the sum of scaled planes is rounded to bfloat16. NotImplementedError as in
    ``quantized_matmul``, and for trits as in ``gpu_trits``.
    """
    hopper.require(interpret)
    check(x, planes, scales, bias, kind, block)
    _, held = places(kind)
    inputs, outputs = x.shape[-1], len(planes[0])
    if not x.size:
        return jnp.zeros((*x.shape[:-1], outputs), x.dtype)
    options = dict(block=block, interpret=interpret, tuning=tuning)
    if kind == "trits":
        y = trit_matmul(x, planes, scales, **options)
    else:
        y = _packed_matmul(x, planes, scales, LEVELS[kind], held, **options)
    if bias is None:
        return y
    wide = block_sums(x, block or inputs) @ bias.astype(jnp.float32).T
    return (y + wide).astype(x.dtype)


def _packed_matmul(x, planes, scales, levels, held, *, block, interpret, tuning):
    """Planes of ``held`` entries to a byte, whose ``levels`` codes stand for."""
    inputs, outputs = x.shape[-1], len(planes[0])
    narrow, part, count = x.dtype == jnp.bfloat16, 8 // held, len(planes)
    for plane in planes:
        gpu_plan.refuse(inputs, outputs, part, block, None, (plane,))
    terms = hopper.terms(x)
    if tuning is None:
        shape = len(terms), inputs, outputs, part, block or inputs
        tuning = default_tuning(*shape, count, not narrow)
    many = jnp.pad(terms, ((0, -len(terms) % tuning.rows), (0, 0)))
    plan = Plan(len(many), inputs, outputs, block, narrow, tuning, count, part, levels)
    size = min(plan.bytes, (block or inputs) * part // 8)
    ordered = fragments.in_order(many, plan.bytes, held)
    product = Product(
        plan,
        [Stream(ordered, tuning.inputs, 2 * size)],
        [Stream(plane, plan.bytes, plan.bytes) for plane in planes],
        scales,
        functools.partial(_consume, plan),
        [size],
    )
    return hopper.joined(product.run(interpret), x, outputs)


def default_tuning(rows, inputs, outputs, part, block, count, exact=False) -> Tuning:
    """By the roofline; sums of every plane and block stand beside the total."""
    step = gpu_plan.step_of(inputs, part, block, STEP)
    sums = max(8, 128 // (count * max(1, step // block)))
    tile = next((r for r in (8, 16, 32) if rows <= r), 64)
    apart = exact or tile <= min(sums, 32)
    if exact:
        tile = min(tile, 1 << sums.bit_length() - 1)
    steps = inputs // step
    warpgroups, split = hopper.spread(rows, tile, outputs, steps)
    lanes = LANES * warpgroups
    stage = 2 * tile * step + count * lanes * step * part // 8
    stages = hopper.depth(stage, lanes, tile, steps // split)
    return Tuning(tile, step, stages, split, warpgroups, apart)


def _consume(plan: Plan, ring: Ring, scales, place: Place):
    """The sums [64, rows] of this warpgroup over all steps, scaled."""
    rows = pl.ds(place.row, LANES)

    def fetch(i):
        """The scales of each group of step ``i``, plane by plane."""
        at = [plan.group(place.first + i, g) for g in range(plan.groups)]
        return [[hopper.column(ref, rows, g) for ref in scales] for g in at]

    if plan.tuning.sums:
        apart = functools.partial(_multiply_apart, plan, ring, place)
        flat = lambda values: [s for group in values for s in group]  # noqa: E731
        terms = plan.count
        return hopper_ring.sums_of_blocks(plan, ring, fetch, apart, flat, terms)
    once = functools.partial(_multiply_sum, plan, ring, place)
    return hopper_ring.sums(plan, ring, fetch, once, constant=plan.block is None)


def _multiply_apart(plan: Plan, ring: Ring, place: Place, accs, at, _) -> None:
    """accs[g, p] += B_p x^T of one step."""
    for p in range(plan.count):
        for j, tile in enumerate(_tiles(plan, ring, place, at, p)):
            for g in range(plan.groups):
                part = tile[:, g * plan.width : (g + 1) * plan.width]
                acc = accs[g * plan.count + p]
                _product(plan, ring, place, acc, part, at, j, g)
            _spare(j)


def _multiply_sum(plan: Plan, ring: Ring, place: Place, accs, at, scales) -> None:
    """accs[g] += (sum over planes of scale B_p) x^T of one step."""
    every = [_tiles(plan, ring, place, at, p) for p in range(plan.count)]
    for j, tiles in enumerate(zip(*every, strict=True)):
        for g, acc in enumerate(accs):
            here = slice(g * plan.width, (g + 1) * plan.width)
            by = [hopper.across(scale, plan.width) for scale in scales[g]]
            parts = [tile[:, here].astype(jnp.float32) for tile in tiles]
            total = sum(a * b for a, b in zip(parts[1:], by[1:], strict=True))
            part = (parts[0] * by[0] + total).astype(jnp.bfloat16)
            _product(plan, ring, place, acc, part, at, j, g)
        _spare(j)


def _spare(j: int) -> None:
    """Free the registers of operands now and then."""
    if j % IN_FLIGHT == IN_FLIGHT - 1:
        plgpu.wgmma_wait(0)


def _tiles(plan: Plan, ring: Ring, place: Place, at, p: int):
    """A plane's entries [64, bytes] for each place in the byte."""
    rows = ring.w[p].at[at, pl.ds(place.warpgroup * LANES, LANES)]
    words, interpret = compat.load(rows, fragments.WORDS), ring.staged is not None
    return fragments.lookup(words, plan.levels, plan.part, interpret=interpret)


def _product(plan: Plan, ring: Ring, place: Place, acc, part, at, j: int, g: int):
    columns = pl.ds(j * plan.bytes + g * plan.width, plan.width)
    inputs = ring.x[0].at[at, :, columns]
    part = hopper_ring.operand(ring, 0, place, part)
    plgpu.wgmma(acc, part, compat.transposed(inputs))
