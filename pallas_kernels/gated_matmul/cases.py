"""Named inputs: decode with a quarter, half and all of the blocks active."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import linear_case
from pallas_kernels.shapes import LLAMA3_8B, TINY, Linear


def make(key, *, rows: int, linear: Linear, block: int, active: int, dtype):
    """A random choice of ``active`` blocks; the index has a slot for every block."""
    one, two, three = jax.random.split(key, 3)
    x = jax.random.normal(one, (rows, linear.inputs), dtype)
    w = jax.random.normal(two, (linear.inputs, linear.outputs), dtype)
    index = jax.random.permutation(three, linear.inputs // block).astype(jnp.int32)
    w = w * jnp.asarray(linear.inputs**-0.5, dtype)
    return x, w, index, jnp.asarray(active, jnp.int32)


def case(linear, rows, block, active):
    """One case; its name says everything that its inputs depend on."""
    inputs = dict(rows=rows, block=block, active=active)
    blocks = linear.inputs // block
    name = f"b{block}-{active}of{blocks}"
    options, work = {"block": block}, active / blocks
    return linear_case(linear, name, make, options, exact=True, work=work, **inputs)


def _cases():
    square, up, ragged = TINY
    yield case(square, 1, 128, 1)
    yield case(up, 20, 128, 0)
    yield case(up, 3, 128, 2)
    yield case(ragged, 5, 43, 3)
    for linear in LLAMA3_8B[:4]:
        blocks = linear.inputs // 128
        for active in (blocks // 4, blocks // 2, blocks):
            yield case(linear, 1, 128, active)
    down = LLAMA3_8B[3]
    yield case(down, 16, 128, 56)
    yield case(down, 1, 512, 14)


CASES = tuple(_cases())
