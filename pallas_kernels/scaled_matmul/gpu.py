"""Hopper: 8-bit tiles from memory to wgmma through shared memory, scales on the sums.

Hopper sums float8 products with about 14 bits (arXiv:2412.19437, section 3.3.2): those
sums leave the tensor core after every step and go on in float32; int8 products stay,
exactly, in int32.
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
from pallas_kernels.scaled_matmul.reference import check

__all__ = ["Tuning", "default_tuning", "scaled_matmul"]


def scaled_matmul(
    x_codes,
    w_codes,
    x_scale,
    w_scale,
    *,
    block: int | None = None,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.scaled_matmul`` on Hopper's tensor cores.

    NotImplementedError where outputs are no multiple of 64, or inputs and blocks of 32.
    """
    hopper.require(interpret)
    width = check(x_codes, w_codes, x_scale, w_scale, block)
    lead, inputs, outputs = x_codes.shape[:-1], x_codes.shape[-1], len(w_codes)
    if not x_codes.size:
        return jnp.zeros((*lead, outputs), out_dtype)
    _refuse(inputs, outputs, width)
    rows, kind = x_codes.size // inputs, x_codes.dtype
    narrow = out_dtype == jnp.bfloat16
    shape = (rows, inputs, outputs, width)
    tuning = tuning or hopper_plan.tuned(
        f"scaled_matmul-{kind}",
        shape,
        narrow and not interpret,
        lambda: default_tuning(*shape, kind, not narrow),
    )
    padding = ((0, -rows % tuning.rows), (0, 0))
    x = jnp.pad(x_codes.reshape(-1, inputs), padding)
    scale = jnp.pad(x_scale.reshape(-1, 1), padding)
    whole = None if width == inputs else width
    plan = Plan(len(x), inputs, outputs, whole, narrow, tuning)
    streams = [Stream(a, tuning.inputs, tuning.inputs) for a in (x, w_codes)]
    consume = functools.partial(_consume, plan, kind == jnp.int8)
    product = Product(plan, streams[:1], streams[1:], (scale, w_scale), consume, [])
    y = product.run(interpret)
    return y[:rows].astype(out_dtype).reshape(*lead, outputs)


def _refuse(inputs: int, outputs: int, width: int) -> None:
    if outputs % LANES:
        raise NotImplementedError(f"{outputs} outputs; wgmma needs a multiple of 64")
    if inputs % 32 or width % 32 or inputs % width:
        raise NotImplementedError(
            f"blocks of {width} of {inputs} inputs; wgmma needs whole multiples of 32"
        )


def default_tuning(rows, inputs, outputs, width, kind, wide=False) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many.

    ``wide``: the result is float32.
    """
    exact = kind == jnp.int8 and width == inputs
    tile = next((r for r in (8, 16, 32, 64, 128) if rows <= r), 256 if exact else 128)
    # Float8 sums lose bits in the tensor core: after 128 inputs they go to float32.
    step = next(s for s in (128, 64, 32) if inputs % s == 0 and width % s == 0)
    return hopper_plan.filled(tile, [step], (rows, inputs, outputs), 1, wide=wide)


def _consume(plan: Plan, integers: bool, ring: Ring, scales, place: Place):
    """Sums [64, rows] over all steps, times both scales, in float32."""
    x_scale, w_scale = scales
    rows = pl.ds(place.row, LANES)
    products = jnp.int32 if integers else jnp.float32

    def fetch(i):
        return hopper.column(w_scale, rows, plan.group(place.first + i, 0))

    def multiply(accs, at, _):
        (acc,) = accs
        weights = ring.w[0].at[at, pl.ds(place.warpgroup * LANES, LANES)]
        plgpu.wgmma(acc, weights, compat.transposed(ring.x[0].at[at]))

    if integers and plan.block is None:
        none = lambda _: ()  # noqa: E731
        total = hopper_ring.sums(
            plan, ring, none, multiply, constant=True, dtype=products
        )
        total = total.astype(jnp.float32) * hopper_ring.by_output(plan, place, w_scale)
    else:
        one = lambda scale: [scale]  # noqa: E731
        total = hopper_ring.sums_of_blocks(
            plan, ring, fetch, multiply, one, products=products
        )
    return total * hopper_ring.by_row(plan, place, x_scale)
