"""Hopper: planes of 8, 4, 2 and 1 bits become one int8 operand in registers.

Codes enter centred, at the top of their bytes: (code - 2^(bits - 1)) 2^(8 - bits) costs
one exclusive or, and the power of two leaves the exact int32 sum at the end. Every
input is multiplied once, however many planes it has.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper, hopper_plan, hopper_ring
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Plan, Stream, Tuning
from pallas_kernels.hopper_ring import Place, Product, Ring
from pallas_kernels.plane_product import fragments
from pallas_kernels.plane_product.fragments import CHUNK
from pallas_kernels.plane_product.reference import check
from pallas_kernels.planes import parts
from pallas_kernels.scaled_matmul.reference import LONGEST

__all__ = ["Tuning", "default_tuning", "plane_product"]

LEAST = 32  # bytes of a plane in a step


def plane_product(
    x_codes,
    planes,
    x_scale,
    w_scale,
    *,
    bits: int,
    offset: int | None = None,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.plane_product`` on Hopper's tensor cores.

    NotImplementedError where outputs are no multiple of 64, inputs of 128 (256 with a
    plane of one bit), or so many that sums of int8 products could overflow.
    """
    hopper.require(interpret)
    check(x_codes, planes, x_scale, w_scale, bits)
    lead, inputs, outputs = x_codes.shape[:-1], x_codes.shape[-1], len(planes[0])
    if not x_codes.size:
        return jnp.zeros((*lead, outputs), out_dtype)
    widths, middle = parts(bits), 2 ** (bits - 1)
    _refuse(inputs, outputs, _least_step(bits))
    rows, narrow = x_codes.size // inputs, out_dtype == jnp.bfloat16
    shape = (rows, inputs, outputs, bits)
    tuning = tuning or hopper_plan.tuned(
        "plane_product",
        shape,
        narrow and not interpret,
        lambda: default_tuning(*shape, not narrow),
    )
    if tuning.inputs % _least_step(bits):
        raise NotImplementedError(f"{tuning} for {bits} bits: no whole chunks")
    padding = ((0, -rows % tuning.rows), (0, 0))
    x = jnp.pad(x_codes.reshape(-1, inputs), padding)
    columns = [jnp.pad(x_scale.reshape(-1, 1), padding), w_scale]
    if offset not in (None, middle):
        whole = x.astype(jnp.int32).sum(-1, keepdims=True)
        columns.append((offset - middle) * whole)
    plan = Plan(len(x), inputs, outputs, None, narrow, tuning)
    sizes = [tuning.inputs * part // 8 for part in widths]
    product = Product(
        plan,
        [Stream(fragments.by_field(x, 8 // widths[0]), tuning.inputs, CHUNK)],
        [Stream(a, size, size) for a, size in zip(planes, sizes, strict=True)],
        columns,
        functools.partial(_consume, plan, bits),
        [CHUNK],
    )
    y = product.run(interpret)
    return y[:rows].astype(out_dtype).reshape(*lead, outputs)


def _refuse(inputs: int, outputs: int, step: int) -> None:
    if outputs % LANES or inputs % step:
        raise NotImplementedError(
            f"{outputs} outputs of {inputs} inputs; accepted are multiples of {LANES} "
            f"and {step}"
        )
    if inputs >= LONGEST:
        raise NotImplementedError(f"{inputs} inputs; accepted: below {LONGEST}")


def _least_step(bits: int) -> int:
    """The fewest inputs whose planes the copy engine can swizzle."""
    return max(CHUNK, LEAST * 8 // parts(bits)[-1])


def default_tuning(rows, inputs, outputs, bits, wide=False) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many.

    ``wide``: the result is float32.
    """
    tile = next((r for r in (8, 16, 32, 64, 128) if rows <= r), 256)
    steps = [_least_step(bits)]
    if tile <= 32 and inputs % 256 == 0:
        steps.insert(0, 256)
    shape = rows, inputs, outputs
    return hopper_plan.filled(tile, steps, shape, bits / 8, wide=wide)


def _consume(plan: Plan, bits: int, ring: Ring, columns, place: Place):
    """Sums [64, rows] over all steps, less the offset's share, times both scales."""
    x_scale, w_scale, *shift = columns
    total = hopper_ring.sums(
        plan,
        ring,
        lambda _: (),
        functools.partial(_multiply, plan, bits, ring, place),
        constant=True,
        dtype=jnp.int32,
    )
    unit = 2.0 ** (bits - 8)
    if shift:
        less = hopper_ring.by_row(plan, place, shift[0], jnp.int32)
        total, unit = (total >> (8 - bits)) - less, 1.0
    total = total.astype(jnp.float32) * hopper_ring.by_row(plan, place, x_scale)
    return total * (hopper_ring.by_output(plan, place, w_scale) * unit)


def _multiply(plan: Plan, bits: int, ring: Ring, place: Place, accs, at, _) -> None:
    """The sums of one step, in chunks of 128 inputs."""
    interpret, widths = ring.staged is not None, parts(bits)
    here = pl.ds(place.warpgroup * LANES, LANES)
    words = [
        fragments.load(plane.at[at, here], part, widths[0])
        for plane, part in zip(ring.w, widths, strict=True)
    ]
    for c in range(plan.tuning.inputs // CHUNK):
        own = [
            word[:, c * CHUNK * part // 8 : (c + 1) * CHUNK * part // 8]
            for word, part in zip(words, widths, strict=True)
        ]
        part = fragments.centred(own, bits, interpret=interpret)
        part = hopper_ring.operand(ring, 0, place, part)
        x = ring.x[0].at[at, :, pl.ds(c * CHUNK, CHUNK)]
        plgpu.wgmma(accs[0], part, compat.transposed(x))
