"""Named inputs: tables per output and per group, of two and four bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import group, linear_case
from pallas_kernels.quantized_matmul.cases import random_planes
from pallas_kernels.shapes import LLAMA3_8B, TINY, Linear


def make(key, *, rows: int, linear: Linear, bits: int, block, dtype):
    """Activations, random codes and sorted tables."""
    keys = iter(jax.random.split(key, 4))
    inputs, outputs = linear.inputs, linear.outputs
    x = jax.random.normal(next(keys), (rows, inputs), dtype)
    planes = random_planes(keys, linear, bits)
    blocks = 1 if block is None else -(-inputs // block)
    table = jax.random.normal(next(keys), (outputs, blocks, 2**bits))
    return x, planes, (jnp.sort(table, -1) * inputs**-0.5).astype(dtype)


def case(linear, rows, bits=4, block=None):
    """One case; its name says everything that its inputs depend on."""
    options = {"bits": bits, "block": block}
    name = f"table{bits}-{group(block)}"
    return linear_case(linear, name, make, options, exact=True, rows=rows, **options)


def _cases():
    square, up, ragged = TINY
    yield case(square, 1)
    yield case(up, 20, 4, 64)
    yield case(up, 3, 4, 128)
    yield case(Linear("tiny", "wide", 1024, 64), 2, 2, 256)
    yield case(Linear("tiny", "wide", 1024, 64), 3, 3, 128)
    yield case(ragged, 5, 3, 32)
    for linear in LLAMA3_8B[:4]:
        for rows in (1, 256):
            yield case(linear, rows)
            yield case(linear, rows, 4, 128)
    yield case(LLAMA3_8B[2], 16, 2, 128)
    for linear in LLAMA3_8B[2:4]:
        yield case(linear, 1, 3)
        yield case(linear, 16, 3, 128)


CASES = tuple(_cases())
