"""Named inputs: decode with a quarter, half and all of the blocks active."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.op import Case
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
    tiny = linear.model == "tiny"
    dtype = jnp.float32 if tiny else jnp.bfloat16
    return Case(
        f"{linear.name}/b{block}-{active}of{linear.inputs // block}/m{rows}",
        functools.partial(
            make, rows=rows, linear=linear, block=block, active=active, dtype=dtype
        ),
        {"block": block},
        tiny=tiny,
        tolerance=1e-5 if tiny else 1e-2,
        flops=2.0 * rows * active * block * linear.outputs,
    )


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
