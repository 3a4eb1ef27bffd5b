"""TPU: planes of 4, 2 and 1 bits become int8 four to a word; x is put in their order.

The j-th field of every byte of a plane meets the inputs j, j + c, j + 2 c ... of x
(c codes in a byte), so weights never move across lanes and each field is one int8
product with the matrix unit.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.integer_tiles import Tuning, scaled_sums
from pallas_kernels.mxu import NT, product
from pallas_kernels.plane_product.reference import check
from pallas_kernels.planes import parts, spans


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
    tuning = tuning or Tuning.default(len(x), inputs, unit)
    tm, tn, tk = tuning.rows, tuning.outputs, tuning.inputs
    middle = 2 ** (bits - 1) if offset is None else offset
    middle -= 128 * (bits == 8)  # bytes enter as int8, 128 lower
    fields = [8 // width for width in widths]
    wide = tuning.padded(x)
    ordered = [wide.reshape(len(wide), -1, c).transpose(2, 0, 1) for c in fields]
    y = scaled_sums(
        functools.partial(_add, spans=spans(bits)),
        (ordered, list(planes)),
        [
            [pl.BlockSpec((c, tm, tk // c), lambda i, j, k: (0, i, k)) for c in fields],
            [pl.BlockSpec((tn, tk // c), lambda i, j, k: (j, k)) for c in fields],
        ],
        x_scale.reshape(-1, 1),
        w_scale,
        shift=middle * x.astype(jnp.int32).sum(-1, keepdims=True),
        steps=inputs // tk,
        tuning=tuning,
        out_dtype=out_dtype,
        interpret=interpret,
        name="plane_product",
    )
    return y.reshape(*lead, len(planes[0]))


def _add(x_refs, w_refs, sum_ref, *, spans):
    """Add each field's product, shifted to its plane's place."""
    for x_ref, w_ref, (width, low) in zip(x_refs, w_refs, spans, strict=True):
        words = pltpu.bitcast(w_ref[...], jnp.int32)
        for field in range(8 // width):
            w = pltpu.bitcast(_field(words, field, width), jnp.int8)
            sum_ref[...] += product(x_ref[field], w, NT) << low


def _field(words, field: int, width: int):
    """One code of each of a word's four bytes; whole bytes become code - 128."""
    if width == 8:
        return words ^ jnp.int32(-0x7F7F7F80)
    mask = (2**width - 1) * 0x01010101
    return (words >> (field * width)) & jnp.int32(mask)
