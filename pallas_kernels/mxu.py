"""Products on a TPU's matrix unit, as the kernels write them."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))  # contract the minor axes: x W^T
TN = (((0,), (0,)), ((), ()))
WIDE = 256  # of the newer matrix units, twice that of the older ones


def dot(a, b, dimensions=NN) -> Array:
    """A float32 sum; float32 operands keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def product(a, b, dimensions=NN) -> Array:
    """Of operands as they are: exact int32 sums of int8, float32 sums of others."""
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(a, b, dimensions, preferred_element_type=kind)


def multiply(
    x_ref,
    tile_ref,
    acc_ref,
    fresh,
    chunk: int,
    *,
    depth: int = WIDE,
    weigh: Callable | None = None,
    finish: Callable | None = None,
):
    """acc += x tile^T, or acc = x tile^T where ``fresh``; ``chunk`` rows at a time.

    Each product is one matrix unit wide and ``depth`` deep and adds to sums in VMEM, so
    that the compiler has nothing to spill. ``fresh`` may be traced. ``weigh(part, n,
    k)`` is added in place of the product of outputs n and inputs k; ``finish(rows, n,
    sums)`` takes each sum once it is whole, while others are under way.
    """
    outputs, inputs = len(tile_ref) * _shared(tile_ref), tile_ref.shape[1]
    zero = jnp.zeros((), acc_ref.dtype)

    def add(rows):
        for n in slices(outputs):
            old = zero if fresh is True else jnp.where(fresh, zero, acc_ref[rows, n])
            for k in slices(inputs, depth):
                part = product(x_ref[rows, k], take(tile_ref, n, k), NT)
                acc_ref[rows, n] = old + (weigh(part, n, k) if weigh else part)
                old = acc_ref[rows, n]
            if finish:
                finish(rows, n, old)

    by_rows(add, len(x_ref), chunk)


def room(outputs: int, inputs: int, dtype):
    """VMEM for a tile [outputs, inputs]; of bfloat16 two outputs share an int32 word.

    Registers hold bfloat16 in such pairs, memory of that dtype may not: each would be
    taken apart when it is stored, and put together again when it is read.
    """
    if dtype == jnp.bfloat16:
        return pltpu.VMEM((outputs // 2, inputs), jnp.int32)
    return pltpu.VMEM((outputs, inputs), dtype)


def put(tile_ref, outputs: slice, inputs: slice, values) -> None:
    """Store ``values`` [outputs, inputs] in the ``room`` of a tile, in its dtype."""
    if tile_ref.dtype == jnp.int32:
        values = pltpu.bitcast(values.astype(jnp.bfloat16), jnp.int32)
    tile_ref[_rows(tile_ref, outputs), inputs] = values.astype(tile_ref.dtype)


def take(tile_ref, outputs: slice, inputs: slice) -> Array:
    """What ``put`` stored, or a part of any other tile."""
    values = tile_ref[_rows(tile_ref, outputs), inputs]
    return pltpu.bitcast(values, jnp.bfloat16) if values.dtype == jnp.int32 else values


def _shared(tile_ref) -> int:
    """Outputs in a row of a tile."""
    return 2 if tile_ref.dtype == jnp.int32 else 1


def _rows(tile_ref, outputs: slice) -> slice:
    each = _shared(tile_ref)
    return slice(outputs.start // each, outputs.stop // each)


def multiply_scaled(
    x_ref,
    tile_ref,
    scale_refs: tuple,
    y_ref,
    acc_ref,
    *,
    steps: int,
    chunk: int,
    **options,
):
    """One of ``steps`` of y = x_scale (x tile^T) w_scale, the last axis of a grid.

    ``scale_refs`` are x_scale [rows, 1] and w_scale [1, outputs], or None for the
    latter where products are weighed already; ``options`` are those of ``multiply``.
    """
    x_scale_ref, w_scale_ref = scale_refs

    def finish(rows, n, total):
        y = total.astype(jnp.float32) * x_scale_ref[rows, :]
        y = y if w_scale_ref is None else y * w_scale_ref[:, n]
        y_ref[rows, n] = y.astype(y_ref.dtype)

    operands = x_ref, tile_ref, acc_ref
    if steps == 1:
        multiply(*operands, True, chunk, finish=finish, **options)
        return
    step = pl.program_id(2)
    multiply(*operands, step == 0, chunk, **options)

    @pl.when(step == steps - 1)
    def _():  # a loop of its own keeps the scales out of registers above
        every = slice(None)
        by_rows(lambda rows: finish(rows, every, acc_ref[rows, :]), len(x_ref), 32)


def tiles(rows: int, outputs: int) -> tuple[int, int]:
    """Rows and outputs of the tiles of many rows, which share a tile of the weight.

    As many rows as VMEM holds, equal up to their padding to 32; of outputs, those are
    best that least stand beyond them.
    """
    height = -(-rows // (32 * -(-rows // 2048))) * 32
    choice = (1024, 768, 512) if rows > 256 else (512,)
    return height, min(choice, key=lambda width: -(-outputs // width) * width)


def depth(kind) -> int:
    """Inputs of one product of ``kind`` that the TPU in use multiplies best.

    The seventh generation has no unit for int8: the compiler goes through floats and
    back to integers, the less often the longer the sums are.
    """
    return 2048 if kind == jnp.int8 and _generation() >= 7 else WIDE


def slices(count: int, width: int = WIDE) -> list[slice]:
    """One for each ``width`` (a matrix unit's) of ``count`` columns."""
    return [slice(i, min(i + width, count)) for i in range(0, count, width)]


def by_rows(act: Callable, count: int, chunk: int):
    """``act`` on every ``chunk`` of ``count`` rows, and on what is left."""
    whole, left = divmod(count, chunk)
    if whole == 1:  # no loop: what stands before may be overlapped with it
        act(slice(0, chunk))
    elif whole:

        def body(i, _):
            act(pl.ds(pl.multiple_of(i * chunk, chunk), chunk))

        lax.fori_loop(0, whole, body, None)
    if left:
        act(slice(whole * chunk, count))


def bf16_arithmetic() -> bool:
    """Whether the vector units of the TPU in use compute in bfloat16."""
    return _generation() >= 6


def unit_width() -> int:
    """Rows and columns of the matrix unit of the TPU in use, or of the newest."""
    return 128 if 0 < _generation() < 6 else 256


def _generation() -> int:
    """Of the TPU in use; 0 where there is none: in the interpreter."""
    try:
        return pltpu.get_tpu_info().generation
    except ValueError:
        return 0


def terms(values, count: int = 2) -> tuple[Array, ...]:
    """bfloat16 arrays whose sum is the values: to 2^-17 two of them, exactly three."""
    if values.dtype == jnp.bfloat16:
        return (values,)
    found, rest = [], values.astype(jnp.float32)
    for _ in range(count):
        found.append(rest.astype(jnp.bfloat16))
        rest -= found[-1].astype(jnp.float32)
    return tuple(found)


def product_of_terms(a, b, dimensions=NN, count: int = 2) -> Array:
    """``product`` of the ``terms`` of a with b, which is bfloat16."""
    return sum(product(term, b, dimensions) for term in terms(a, count))


def before(a) -> Array:
    """What stands in the lane before, zero in the first."""
    lane = lax.broadcasted_iota(jnp.int32, a.shape, 1)
    return jnp.where(lane > 0, pltpu.roll(a, 1, 1), 0)


def ones_where(condition, dtype) -> Array:
    """1 where true: a matrix that moves lanes, exactly."""
    # A mask becomes bfloat16 in two steps.
    return condition.astype(jnp.float32).astype(dtype)
