"""Named inputs: one percent of the entries, as SpQR keeps, and SqueezeLLM's share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.cases import linear_case
from pallas_kernels.scattered_matmul.segments import pack
from pallas_kernels.shapes import LLAMA3_8B, TINY, Linear


def make(key, *, rows: int, linear: Linear, share: float, dtype):
    """Random places; in each stripe of outputs some inputs have more than others."""
    keys = iter(jax.random.split(key, 4))
    shape = linear.inputs, linear.outputs
    count = int(share * math.prod(shape))
    x = jax.random.normal(next(keys), (rows, linear.inputs), dtype)
    dense = jax.random.normal(next(keys), shape, dtype)
    often = jax.random.normal(next(keys), (linear.inputs, 1))
    score = often + jax.random.normal(next(keys), shape)
    _, largest = jax.lax.top_k(score.ravel(), count)
    flat = jnp.zeros(score.size, bool).at[largest].set(True)
    return x, pack(dense, flat.reshape(shape), count)


def case(linear, rows, share=0.01):
    """One case; its name says everything that its inputs depend on."""
    options, name = {"outputs": linear.outputs}, f"{share:.2%}"
    inputs = dict(rows=rows, share=share, work=share)
    return linear_case(linear, name, make, options, exact=True, **inputs)


def _cases():
    square, up, ragged = TINY
    yield case(square, 1)
    yield case(up, 20, 0.02)
    yield case(ragged, 3, 0.5)
    yield case(ragged, 300, 0.1)
    for linear in LLAMA3_8B[:4]:
        yield case(linear, 1)
    down = LLAMA3_8B[3]
    for rows in (16, 64, 256, 2048):
        yield case(down, rows)
    yield case(down, 1, 0.0045)


CASES = tuple(_cases())
