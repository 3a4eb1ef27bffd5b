"""TPU: planes of 4, 2 and 1 bits become int8 four to a word; x is put in their order.

The j-th field of every byte of a plane meets the inputs j, j + c, j + 2 c ... of x
(c codes in a byte), so weights never move across lanes and each field is one int8
product with the matrix unit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.plane_product.reference import check
from pallas_kernels.quantized_matmul.reference import parts


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tile sizes: rows of x, outputs, inputs (whole lanes of every plane)."""

    rows: int
    outputs: int
    inputs: int


def default_tuning(rows: int, outputs: int, inputs: int, unit: int) -> Tuning:
    """The widest tile of inputs that divides them, up to 4,096."""
    tile = next(t for t in range(4096, 0, -unit) if inputs % t == 0)
    return Tuning(min(256, -(-rows // 32) * 32), 512, tile)


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
    """``reference.plane_product`` where every plane's bytes are whole lanes."""
    check(x_codes, planes, x_scale, w_scale, bits)
    lead, inputs = x_codes.shape[:-1], x_codes.shape[-1]
    widths = parts(bits)
    unit = 128 * 8 // min(widths)
    if inputs % unit:
        raise NotImplementedError(
            f"{inputs} inputs of {bits} bits are not whole lanes; accepted: multiples "
            f"of {unit}"
        )
    x = x_codes.reshape(-1, inputs)
    rows, outputs = len(x), len(planes[0])
    tuning = tuning or default_tuning(rows, outputs, inputs, unit)
    tm, tn, tk = tuning.rows, tuning.outputs, tuning.inputs
    padded = -(-rows // tm) * tm
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    middle = 2 ** (bits - 1) if offset is None else offset
    middle -= 128 * (bits == 8)  # bytes enter as int8, 128 lower
    shift = middle * x.astype(jnp.int32).sum(-1, keepdims=True)
    x_scale = jnp.pad(x_scale.reshape(-1, 1), ((0, padded - rows), (0, 0)))
    fields = [8 // width for width in widths]
    ordered = [x.reshape(padded, -1, c).transpose(2, 0, 1) for c in fields]
    column = pl.BlockSpec((tm, 1), lambda i, j, k: (i, 0))
    y = pl.pallas_call(
        functools.partial(_kernel, widths=widths),
        grid=(padded // tm, pl.cdiv(outputs, tn), inputs // tk),
        in_specs=[
            [pl.BlockSpec((c, tm, tk // c), lambda i, j, k: (0, i, k)) for c in fields],
            [pl.BlockSpec((tn, tk // c), lambda i, j, k: (j, k)) for c in fields],
            column,
            column,
            pl.BlockSpec((1, tn), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((tm, tn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), out_dtype),
        scratch_shapes=[pltpu.VMEM((tm, tn), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="plane_product",
    )(ordered, list(planes), shift, x_scale, w_scale.reshape(1, -1))
    return y[:rows].reshape(*lead, outputs)


def _kernel(x_refs, w_refs, shift_ref, x_scale_ref, w_scale_ref, y_ref, sum_ref, *,
            widths):  # fmt: skip
    """Add each field's product, shifted to its plane's place."""
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    low = sum(widths)
    for x_ref, w_ref, width in zip(x_refs, w_refs, widths, strict=True):
        low -= width
        words = pltpu.bitcast(w_ref[...], jnp.int32)
        for field in range(8 // width):
            w = pltpu.bitcast(_field(words, field, width), jnp.int8)
            sum_ref[...] += _product(x_ref[field], w) << low

    def finish(i, _):
        rows = pl.ds(i * 32, 32)
        y = (sum_ref[rows, :] - shift_ref[rows, :]).astype(jnp.float32)
        y = y * x_scale_ref[rows, :] * w_scale_ref[...]
        y_ref[rows, :] = y.astype(y_ref.dtype)

    @pl.when(step == steps - 1)
    def _():
        lax.fori_loop(0, sum_ref.shape[0] // 32, finish, None)


def _field(words, field: int, width: int):
    """One code of each of a word's four bytes; whole bytes become code - 128."""
    if width == 8:
        return words ^ jnp.int32(-0x7F7F7F80)
    mask = (2**width - 1) * 0x01010101
    return (words >> (field * width)) & jnp.int32(mask)


def _product(x, w):
    return lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
