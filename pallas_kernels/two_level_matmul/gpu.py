"""Hopper: 4-bit codes become int8 operands in registers; sums are exact, in int32.

For few rows the codes less their zero points are multiplied, and each group's sums
scaled: least work per byte of W. For many rows the integer scales act on the weights,
which are int8 by construction, and one sum goes over all inputs.
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
from pallas_kernels.two_level_matmul.reference import check

__all__ = ["Tuning", "default_tuning", "two_level_matmul"]

BYTES = CHUNK // 2  # of W in a chunk


def two_level_matmul(
    x_codes,
    planes,
    group_scale,
    group_zero,
    x_scale,
    w_scale,
    *,
    bits: int = 4,
    block: int = 128,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.two_level_matmul`` on Hopper's tensor cores, for codes of 4 bits.

    Weights that would not fit into int8 wrap around. NotImplementedError where outputs
    are no multiple of 64, inputs of 128, or groups neither 32, 64 nor multiples of 128
    that divide the inputs.
    """
    hopper.require(interpret)
    check(x_codes, planes, group_scale, group_zero, x_scale, w_scale, bits, block)
    lead, inputs, outputs = x_codes.shape[:-1], x_codes.shape[-1], len(planes[0])
    if not x_codes.size:
        return jnp.zeros((*lead, outputs), out_dtype)
    _refuse(inputs, outputs, bits, block)
    rows, narrow = x_codes.size // inputs, out_dtype == jnp.bfloat16
    shape = (rows, inputs, outputs, block)
    tuning = tuning or hopper_plan.tuned(
        "two_level_matmul",
        shape,
        narrow and not interpret,
        lambda: default_tuning(*shape, not narrow),
    )
    if tuning.inputs % CHUNK or (tuning.sums and block % CHUNK):
        raise NotImplementedError(f"{tuning} for groups of {block}: no whole chunks")
    padding = ((0, -rows % tuning.rows), (0, 0))
    x = fragments.by_field(jnp.pad(x_codes.reshape(-1, inputs), padding), 2)
    by_row = jnp.pad(x_scale.reshape(-1, 1), padding)
    plan = Plan(len(x), inputs, outputs, block, narrow, tuning)
    zeros = () if group_zero is None else (group_zero,)
    product = Product(
        plan,
        [Stream(x, tuning.inputs, CHUNK)],
        [Stream(planes[0], tuning.inputs // 2, tuning.inputs // 2)],
        (by_row, w_scale, group_scale, *zeros),
        functools.partial(_consume, plan),
        [CHUNK],
    )
    y = product.run(interpret)
    return y[:rows].astype(out_dtype).reshape(*lead, outputs)


def _refuse(inputs: int, outputs: int, bits: int, block: int) -> None:
    if bits != 4:
        raise NotImplementedError(f"{bits}-bit codes; this kernel has 4 bits")
    if outputs % LANES or inputs % CHUNK:
        raise NotImplementedError(
            f"{outputs} outputs of {inputs} inputs; accepted are multiples of {LANES} "
            f"and {CHUNK}"
        )
    if inputs % block or (block % CHUNK and block not in (32, 64)):
        raise NotImplementedError(
            f"groups of {block} of {inputs} inputs; accepted: 32, 64, and multiples of "
            f"{CHUNK} that divide the inputs"
        )


def default_tuning(rows, inputs, outputs, block, wide=False) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many.

    Each group's sums are scaled while that takes less work than scaling its weights.
    ``wide``: the result is float32.
    """
    tile = next((r for r in (8, 16, 32, 64, 128) if rows <= r), 256)
    few = tile <= 32
    whole = inputs % 256 == 0 and (block % 256 == 0 or 256 % block == 0)
    return hopper_plan.filled(
        tile,
        (256, CHUNK) if few and whole else (CHUNK,),
        (rows, inputs, outputs),
        1 / 2,
        wide=wide,
        sums=few and block % CHUNK == 0,
    )


def _consume(plan: Plan, ring: Ring, others, place: Place):
    """Sums [64, rows] over all steps, times the float scales."""
    x_scale, w_scale, group_scale, *group_zero = others
    rows, groups = pl.ds(place.row, LANES), range(plan.groups)

    def fetch(i):
        """The scales and zero points of each group of step ``i``."""
        at = [plan.group(place.first + i, g) for g in groups]
        column = functools.partial(hopper.column, dtype=jnp.int32)
        scale = [column(group_scale, rows, g) for g in at]
        if not group_zero:
            return scale, [_middle() for _ in groups]
        return scale, [column(group_zero[0], rows, g) for g in at]

    multiply = functools.partial(_multiply, plan, ring, place)
    if plan.tuning.sums:
        total = hopper_ring.sums_of_blocks(
            plan,
            ring,
            fetch,
            multiply,
            lambda values: values[0],
            products=jnp.int32,
            dtype=jnp.int32,
        )
    else:
        total = hopper_ring.sums(
            plan, ring, fetch, multiply, constant=False, dtype=jnp.int32
        )
    total = total.astype(jnp.float32) * hopper_ring.by_row(plan, place, x_scale)
    return total * hopper_ring.by_output(plan, place, w_scale)


def _middle():
    """The zero point of codes without one, for each output."""
    column = jnp.full((LANES,), 8, jnp.int32)
    return plgpu.layout_cast(column, plgpu.Layout.WGMMA.reduce(1))


def _multiply(plan: Plan, ring: Ring, place: Place, accs, at, values) -> None:
    """accs[g] += W x^T of one step, in chunks of 128 inputs."""
    scale, zero = values
    interpret, count = ring.staged is not None, plan.tuning.inputs // CHUNK
    words = fragments.load(
        ring.w[0].at[at, pl.ds(place.warpgroup * LANES, LANES)], 4, 4
    )
    for c in range(count):
        own = words[:, c * BYTES : (c + 1) * BYTES]
        here = _share(c, count, plan.groups)
        if plan.tuning.sums:
            part = fragments.shifted(own, zero[here], interpret=interpret)
        else:
            part = fragments.scaled(own, scale[here], zero[here], interpret=interpret)
        part = hopper_ring.operand(ring, 0, place, part)
        x = ring.x[0].at[at, :, pl.ds(c * CHUNK, CHUNK)]
        plgpu.wgmma(accs[here.start], part, compat.transposed(x))


def _share(chunk: int, chunks: int, groups: int) -> slice:
    """The groups of a step that a chunk belongs to, or that it holds."""
    first = chunk * groups // chunks
    return slice(first, max(first + 1, (chunk + 1) * groups // chunks))
