"""Named inputs: one to three planes of each kind, with and without bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import group, linear_case
from pallas_kernels.plane_matmul.reference import pack
from pallas_kernels.shapes import LLAMA3_8B, TINY, Linear


def make(key, *, rows: int, linear: Linear, kind, count: int, block, bias, dtype):
    """Activations, random planes, scales that halve from plane to plane, bias."""
    keys = iter(jax.random.split(key, 2 * count + 2))
    inputs, outputs = linear.inputs, linear.outputs
    blocks = 1 if block is None else inputs // block
    x = jax.random.normal(next(keys), (rows, inputs), dtype)
    planes, scales = [], []
    for index in range(count):
        values = jax.random.randint(next(keys), (outputs, inputs), -1, 2)
        if kind == "binary":
            values = jnp.where(values < 0, -1, 1)
        planes.append(pack(values.astype(jnp.int8), kind))
        scale = jax.random.uniform(next(keys), (outputs, blocks), dtype, 0.5, 1.5)
        scales.append(scale * 2.0**-index * inputs**-0.5)
    offset = None
    if bias:
        offset = jax.random.normal(next(keys), (outputs, blocks), dtype)
        offset = offset * 0.1 * inputs**-0.5
    return x, tuple(planes), tuple(scales), offset


def case(linear, rows, kind, count, block, *, bias=False):
    """One case; its name says everything that its inputs depend on."""
    options = {"kind": kind, "block": block}
    inputs = dict(rows=rows, count=count, bias=bias, work=count, **options)
    name = f"{kind}{count}-{group(block)}{'-bias' * bias}"
    return linear_case(linear, name, make, options, **inputs)


def _cases():
    square, up, _ = TINY
    yield case(square, 1, "binary", 1, None)
    yield case(square, 3, "binary", 2, 128, bias=True)
    yield case(square, 2, "ternary", 2, 128)
    yield case(up, 80, "ternary", 1, 64)
    yield case(square, 3, "trits", 2, 64, bias=True)
    yield case(up, 20, "trits", 1, None)
    yield case(Linear("tiny", "long", 2816, 32), 2, "trits", 1, 128)
    yield case(Linear("tiny", "odd", 172, 64), 1, "trits", 2, 43)
    for linear in (LLAMA3_8B[1], LLAMA3_8B[3]):
        for rows in (1, 16, 256):
            yield case(linear, rows, "binary", 3, 128, bias=True)
            yield case(linear, rows, "ternary", 2, 128)
            yield case(linear, rows, "trits", 2, 128)
    yield case(LLAMA3_8B[2], 1, "ternary", 1, None)


CASES = tuple(_cases())
