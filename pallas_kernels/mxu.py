"""Products on a TPU's matrix unit, as the kernels write them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))  # contract the minor axes: x W^T
TN = (((0,), (0,)), ((), ()))


def dot(a, b, dimensions=NN) -> Array:
    """A float32 sum; float32 operands keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


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


def halves(values) -> tuple[Array, ...]:
    """bfloat16 terms whose sum is the values to 2^-17."""
    high = values.astype(jnp.bfloat16)
    if values.dtype == jnp.bfloat16:
        return (high,)
    wide = values.astype(jnp.float32)
    return high, (wide - high.astype(jnp.float32)).astype(jnp.bfloat16)


def ones_where(condition, dtype) -> Array:
    """1 where true: a matrix that moves lanes, exactly."""
    # A mask becomes bfloat16 in two steps.
    return condition.astype(jnp.float32).astype(dtype)
