"""Named inputs: weights of 1 to 8 bits on real shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import integer_case
from pallas_kernels.quantized_matmul.cases import random_planes
from pallas_kernels.shapes import LLAMA3_8B, TINY, Linear


def make(key, *, rows: int, linear: Linear, bits: int):
    """Random codes of both sides and positive scales."""
    keys = iter(jax.random.split(key, 6))
    inputs, outputs = linear.inputs, linear.outputs
    x = jax.random.randint(next(keys), (rows, inputs), -127, 128, jnp.int8)
    planes = random_planes(keys, linear, bits)
    x_scale = jax.random.uniform(next(keys), (rows, 1), minval=0.5, maxval=1.5)
    w_scale = jax.random.uniform(next(keys), (outputs, 1), minval=0.5, maxval=1.5)
    return x, planes, x_scale, w_scale * (inputs**-0.5 / (20 * 2**bits))


def case(linear, rows, bits, offset: int | None = None):
    """One case; its name says everything that its inputs depend on."""
    inputs = dict(rows=rows, bits=bits)
    name, options = f"w{bits}a8", {"bits": bits}
    if offset is not None:
        name, options = f"{name}-less{offset}", {**options, "offset": offset}
    return integer_case(linear, name, make, options, **inputs)


def _cases():
    wide = Linear("tiny", "wide", 1024, 96)
    yield case(wide, 1, 1)
    yield case(wide, 3, 3)
    yield case(wide, 20, 4)
    yield case(wide, 2, 8)
    yield case(TINY[2], 5, 6)
    even = Linear("tiny", "even", 512, 64)
    yield case(even, 2, 1)
    yield case(even, 3, 3, offset=1)
    yield case(even, 20, 4)
    yield case(even, 40, 7)
    yield case(even, 9, 8)
    gate_up, down = LLAMA3_8B[2:4]
    for bits in (2, 3, 4, 8):
        for rows in (1, 16, 2048):
            yield case(gate_up, rows, bits)
        yield case(down, 16, bits)


CASES = tuple(_cases())
