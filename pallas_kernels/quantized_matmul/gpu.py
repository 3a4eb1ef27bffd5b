"""Hopper: packed weights from memory to the tensor core's registers, never dense.

out^T = W x^T, because wgmma takes a register operand on its left only. A byte of W
holds 8 / part codes; x, which is small, is reordered outside so that the codes at one
place of their bytes meet one contiguous slice of x. A producer warpgroup feeds a ring
of tiles through the copy engine; the others turn bytes into operands and multiply.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_ring
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_ring import Place, Product, Ring
from pallas_kernels.hopper_term import Term
from pallas_kernels.quantized_matmul import fragments
from pallas_kernels.quantized_matmul.gpu_plan import (
    Plan,
    Plane,
    Tuning,
    default_tuning,
    plan_of,
    refuse,
    tuned,
)
from pallas_kernels.quantized_matmul.reference import check

__all__ = ["Tuning", "default_tuning", "quantized_matmul"]


def quantized_matmul(
    x,
    planes,
    scale,
    zero=None,
    low_rank=None,
    *,
    bits: int,
    block: int | None,
    levels: tuple[float, ...] | None = None,
    offset: float | None = None,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.quantized_matmul`` on Hopper's tensor cores.

    Sums are float32. x is multiplied in bfloat16: wider x as two terms, high and low,
    in one pass over W. Rounded to bfloat16 are tables (4 bits) and, for many rows of
    bfloat16, scaled weights. Where few rows meet a small rank, R is multiplied in the
    same kernel; x L is a product before it. NotImplementedError where a block of inputs
    is no multiple of 16 bytes of each plane, rows of planes are not aligned to 16
    bytes, or outputs to 64.
    """
    hopper.require(interpret)
    check(x, planes, scale, zero, low_rank, bits, block, levels)
    lead, inputs = x.shape[:-1], x.shape[-1]
    outputs, narrow = len(planes[0]), x.dtype == jnp.bfloat16
    if not x.size:
        return jnp.zeros((*lead, outputs), x.dtype)
    terms = hopper.terms(x)
    refuse(inputs, outputs, bits, block, levels, planes)
    if tuning is None:
        shape = (len(terms), inputs, outputs, bits, block or inputs)
        tuning = tuned("quantized_matmul", shape, narrow, interpret)
    many = jnp.pad(terms, ((0, -len(terms) % tuning.rows), (0, 0)))
    plan = plan_of(many, outputs, zero, bits, block, levels, offset, tuning, narrow)
    streams = (
        [plan.stream(_shifted(many, plane), plane) for plane in plan.planes],
        [plane.stream(codes) for codes, plane in zip(planes, plan.planes, strict=True)],
    )
    plan, term, beside = Term.of(x, low_rank, plan, streams)
    product = Product(
        plan,
        *streams,
        (scale, *(() if plan.zero == "none" else (zero,))),
        functools.partial(_consume, plan),
        [plane.block for plane in plan.planes],
        term,
    )
    return hopper.joined(product.run(interpret), x, outputs, beside)


def _shifted(x, plane: Plane):
    """x times the plane's weight 2^low, exactly."""
    return (x * jnp.asarray(2.0**plane.low, x.dtype)).astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Scales and zero points of this warpgroup's 64 rows of W, from device memory."""

    plan: Plan
    scale: object
    zero: object
    first: object
    row: object

    def __call__(self, i) -> tuple[list, list]:
        """(scales, zeros) of the blocks of step ``i``, in float32."""
        rows, count = pl.ds(self.row, LANES), range(self.plan.groups)
        at = [self.plan.group(self.first + i, g) for g in count]
        refs = (self.scale, self.zero)
        return tuple(
            [] if ref is None else [hopper.column(ref, rows, g) for g in at]
            for ref in refs
        )


def _consume(plan: Plan, ring: Ring, others, place: Place):
    """The sums [64, rows] of this warpgroup over all steps, scaled."""
    scale, *zero = others
    columns = _Columns(plan, scale, zero[0] if zero else None, place.first, place.row)
    multiply = functools.partial(_multiply, plan, ring, place)
    if plan.block is None:
        plain = functools.partial(multiply, scaled=False)
        total = hopper_ring.sums(plan, ring, columns, plain, constant=True)
        return total * hopper.across(columns(0)[0][0], plan.tuning.rows)
    if plan.tuning.sums:
        plain = functools.partial(multiply, scaled=False)
        scales = lambda values: values[0]  # noqa: E731
        return hopper_ring.sums_of_blocks(plan, ring, columns, plain, scales)
    scaled = functools.partial(multiply, scaled=True)
    return hopper_ring.sums(plan, ring, columns, scaled, constant=False)


def _multiply(plan: Plan, ring: Ring, place: Place, accs, at, values, *, scaled):
    """accs[g] += W x^T of one step, plane by plane and place by place."""
    scales, zeros = values
    interpret = ring.staged is not None
    for p, plane in enumerate(plan.planes):
        rows = ring.w[p].at[at, pl.ds(place.warpgroup * LANES, LANES)]
        words = compat.load(rows, plgpu.Layout.WGMMA_UPCAST_2X)
        for j, tile in enumerate(_operands(plan, plane, words, interpret)):
            for g, acc in enumerate(accs):
                part = tile[:, g * plane.block : (g + 1) * plane.block]
                if plan.levels is None:
                    part = _centred(plan, plane, part, zeros[g] if zeros else None)
                if scaled:
                    part = part * hopper.across(
                        scales[g].astype(jnp.bfloat16), plane.block
                    )
                columns = pl.ds(j * plane.bytes + g * plane.block, plane.block)
                inputs = ring.x[p].at[at, :, columns]
                part = hopper_ring.operand(ring, p, place, part)
                plgpu.wgmma(acc, part, compat.transposed(inputs))


def _operands(plan: Plan, plane: Plane, words, interpret: bool):
    """The tile of W [64, bytes] for each place in the byte."""
    if plan.levels is not None:
        yield from fragments.lookup(words, plan.levels, interpret=interpret)
        return
    for j in range(plane.places):
        yield fragments.digits(words, plane.part, j, interpret=interpret)


def _centred(plan: Plan, plane: Plane, tile, zero):
    """Digits less the zero point, exact for whole ones; the lowest plane carries it."""
    base = -128.0 if plane.part == 8 else 128.0
    if plane.low:
        return tile - _constant(base)
    if plan.zero == "none":
        both = base + plan.middle
        if _constant(both) == both:
            return tile if both == 0 else tile - _constant(both)
        return (tile - _constant(base)) - _constant(plan.middle)
    if plan.zero == "integer":
        return tile - hopper.across((zero + base).astype(jnp.bfloat16), plane.block)
    return (tile - _constant(base)) - hopper.across(
        zero.astype(jnp.bfloat16), plane.block
    )


def _constant(value: float):
    """A bfloat16 known while tracing."""
    return np.asarray(value, jnp.bfloat16)
