"""TPU: both factors, the row maximum and the codes while the rows are in VMEM."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hadamard_quantize.reference import check


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Rows of x in a tile."""

    rows: int = 32


def hadamard_quantize(
    x,
    a,
    b,
    *,
    bits: int = 8,
    clip: float = 1.0,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.hadamard_quantize`` where b is a multiple of 128 and a b = n.

    Columns of B are put in the order even, odd for 4-bit codes, so that the two codes
    of a byte lie in the same lane of two halves.
    """
    check(x, a, b, bits, clip)
    lead, width, m, n = x.shape[:-1], x.shape[-1], len(a), len(b)
    if n % 128 or m * n != width:
        raise NotImplementedError(
            f"factors of {m} and {n} for the width {width}; this kernel has a second "
            "factor of whole lanes of 128, and one block"
        )
    if bits == 4 and n != 128:
        raise NotImplementedError(f"4-bit codes with a second factor of {n}, not 128")
    x2 = x.reshape(-1, width)
    rows = len(x2)
    tile = (tuning or Tuning()).rows
    padded = -(-rows // tile) * tile
    x2 = jnp.pad(x2, ((0, padded - rows), (0, 0))).reshape(padded, m, n)
    kind = jnp.int8 if bits == 8 else jnp.uint8
    out = (m, n) if bits == 8 else (m, n // 2)
    if bits == 4:
        b = jnp.concatenate((b[:, ::2], b[:, 1::2]), 1)
    codes, scale = pl.pallas_call(
        functools.partial(_kernel, bits=bits, clip=clip),
        grid=(padded // tile,),
        in_specs=[
            pl.BlockSpec((tile, m, n), lambda i: (i, 0, 0)),
            pl.BlockSpec((m, m), lambda i: (0, 0)),
            pl.BlockSpec((n, n), lambda i: (0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((tile, *out), lambda i: (i, 0, 0)),
            pl.BlockSpec((tile, 1, 1), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((padded, *out), kind),
            jax.ShapeDtypeStruct((padded, 1, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="hadamard_quantize",
    )(x2, a.T, b)
    codes = codes[:rows].reshape(*lead, -1)
    return codes, scale[:rows].reshape(*lead, 1)


def _kernel(x_ref, a_ref, b_ref, codes_ref, scale_ref, *, bits: int, clip: float):
    """One row of x at a time: Y = A^T X B, then its codes."""
    top = 2 ** (bits - 1) - 1

    def row(i, _):
        y = _dot(_dot(a_ref[...], x_ref[i]), b_ref[...])
        largest = jnp.max(jnp.abs(y), keepdims=True)
        scale = jnp.where(largest == 0, 1.0, largest * (clip / top))
        codes = jnp.clip(jnp.round(y / scale), -top, top).astype(jnp.int32)
        if bits == 4:
            half = codes.shape[1] // 2
            raised = codes + 8
            codes = raised[:, :half] | (raised[:, half:] << 4)
        codes_ref[i] = codes.astype(codes_ref.dtype)
        scale_ref[i] = scale

    lax.fori_loop(0, x_ref.shape[0], row, None)


def _dot(left, right):
    """A product of which bfloat16 operands stay exact, and float32 ones too."""
    if right.dtype == left.dtype == jnp.bfloat16:
        return jnp.dot(left, right, preferred_element_type=jnp.float32)
    return jnp.dot(
        left.astype(jnp.float32),
        right.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
