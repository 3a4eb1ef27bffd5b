"""Named inputs: W4A8 with integer group scales on real shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import integer_case
from pallas_kernels.shapes import LLAMA3_8B, QWEN25_7B, TINY, Linear


def make(key, *, rows: int, linear: Linear, block: int, zeros: bool):
    """Codes, group scales of 1 to 8 (7 would fit 15 * 8 <= 127), float scales."""
    keys = iter(jax.random.split(key, 6))
    inputs, outputs = linear.inputs, linear.outputs
    groups = (outputs, -(-inputs // block))
    x = jax.random.randint(next(keys), (rows, inputs), -127, 128, jnp.int8)
    plane = jax.random.bits(next(keys), (outputs, -(-inputs // 2)), jnp.uint8)
    scale = jax.random.randint(next(keys), groups, 1, 9, jnp.int8)
    zero = jax.random.randint(next(keys), groups, 0, 16).astype(jnp.uint8)
    x_scale = jax.random.uniform(next(keys), (rows, 1), minval=0.5, maxval=1.5)
    w_scale = jax.random.uniform(next(keys), (outputs, 1), minval=0.5, maxval=1.5)
    unit = inputs**-0.5 / 2500
    return x, (plane,), scale, zero if zeros else None, x_scale, w_scale * unit


def case(linear, rows, block=128, *, zeros=True):
    """One case; its name says everything that its inputs depend on."""
    inputs = dict(rows=rows, block=block, zeros=zeros)
    name = f"w4a8-g{block}-{'asym' if zeros else 'sym'}"
    return integer_case(linear, name, make, {"block": block}, **inputs)


def _cases():
    square, up, ragged = TINY
    yield case(square, 1)
    yield case(up, 20, zeros=False)
    yield case(up, 40, 256)
    yield case(ragged, 5, 32)
    yield case(square, 3, 32)
    for linear in (*LLAMA3_8B[:4], *QWEN25_7B):
        yield case(linear, 16)
        yield case(linear, 2048)
    yield case(LLAMA3_8B[2], 1)
    yield case(LLAMA3_8B[2], 256)
    yield case(LLAMA3_8B[2], 16, 256)


CASES = tuple(_cases())
