"""Named inputs: int8 and float8 codes, scales per channel and per block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import group, integer_case
from pallas_kernels.shapes import LLAMA3_8B, QWEN25_7B, TINY, Linear

KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def codes(key, shape: tuple[int, ...], kind: str):
    """Random codes: int8 over the whole symmetric range, float8 normal."""
    if kind == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape).astype(KINDS[kind])


def make(key, *, rows: int, linear: Linear, kind: str, block: int | None):
    """Codes of both sides and positive scales."""
    one, two, three, four = jax.random.split(key, 4)
    blocks = 1 if block is None else -(-linear.inputs // block)
    x = codes(one, (rows, linear.inputs), kind)
    w = codes(two, (linear.outputs, linear.inputs), kind)
    x_scale = jax.random.uniform(three, (rows, 1), minval=0.5, maxval=1.5)
    w_scale = jax.random.uniform(four, (linear.outputs, blocks), minval=0.5, maxval=1.5)
    unit = 1 / 5400 if kind == "int8" else 1.0  # products then have variance near one
    return x, w, x_scale, w_scale * unit * linear.inputs**-0.5


def case(linear, rows, kind="int8", block=None):
    """One case; its name says everything that its inputs depend on."""
    inputs = dict(rows=rows, kind=kind, block=block)
    name = f"{kind}-{group(block)}"
    return integer_case(linear, name, make, {"block": block}, **inputs)


def _cases():
    square, up, ragged = TINY
    yield case(square, 1)
    yield case(up, 20, "int8", 128)
    yield case(ragged, 5)
    yield case(square, 1, "fp8")
    yield case(ragged, 20, "fp8")
    yield case(square, 40, "int8", 64)
    yield case(ragged, 3, "int8", 32)
    gate_up, down = LLAMA3_8B[2:4]
    for kind in KINDS:
        for linear in (*LLAMA3_8B[:4], *QWEN25_7B):
            yield case(linear, 16, kind)
            yield case(linear, 2048, kind)
        for linear in (gate_up, down):
            yield case(linear, 1, kind)
            yield case(linear, 256, kind)
            yield case(linear, 16, kind, 128)
            yield case(linear, 2048, kind, 128)


CASES = tuple(_cases())
