"""Named inputs: bit widths, symmetry, tables and row counts on real shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import group, linear_case
from pallas_kernels.planes import parts
from pallas_kernels.shapes import LLAMA3_8B, QWEN25_7B, TINY, Linear

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004,
    0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684,
    1.0,
)  # fmt: skip


def random_planes(keys, linear: Linear, bits: int) -> tuple[jax.Array, ...]:
    """Planes of random codes [outputs, inputs], one key of ``keys`` for each."""
    return tuple(
        jax.random.bits(
            next(keys), (linear.outputs, -(-linear.inputs * part // 8)), jnp.uint8
        )
        for part in parts(bits)
    )


def factors(key, linear: Linear, rank: int) -> tuple[jax.Array, jax.Array]:
    """(L, R) of a correction that is as large as x, in bfloat16."""
    first, second = jax.random.split(key)
    left = jax.random.normal(first, (linear.inputs, rank)) * linear.inputs**-0.5
    right = jax.random.normal(second, (rank, linear.outputs)) * rank**-0.5
    return left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)


def make(key, *, rows, linear: Linear, bits, block, zeros: bool, rank: int, dtype):
    """Activations, random codes, positive scales, zero points, factors (L, R)."""
    keys = iter(jax.random.split(key, 8))
    inputs, outputs = linear.inputs, linear.outputs
    x = jax.random.normal(next(keys), (rows, inputs), dtype)
    planes = random_planes(keys, linear, bits)
    blocks = 1 if block is None else -(-inputs // block)
    scale = jax.random.uniform(next(keys), (outputs, blocks), dtype, 0.5, 1.5)
    zero = None
    if zeros:
        zero = jax.random.randint(next(keys), scale.shape, 0, 2**bits).astype(jnp.uint8)
    arguments = x, planes, scale * inputs**-0.5, zero
    return (*arguments, factors(next(keys), linear, rank)) if rank else arguments


def case(linear, rows, bits, block=128, *, zeros=False, levels=None, rank=0):
    """One case; its name says everything that its inputs depend on."""
    kind = "asym" if zeros else "table" if levels else "sym"
    extra = f"-rank{rank}" if rank else ""
    options = {"bits": bits, "block": block, "levels": levels}
    inputs = dict(rows=rows, bits=bits, block=block, zeros=zeros, rank=rank)
    name = f"w{bits}-{group(block)}-{kind}{extra}"
    return linear_case(linear, name, make, options, **inputs)


def _cases():
    square, up, ragged = TINY
    for bits in (1, 2, 3, 4, 8):
        yield case(square, 1, bits)
        yield case(up, 20, bits, 64, zeros=True)
    yield case(square, 16, 4, None)
    yield case(up, 3, 4, 64, levels=NF4)
    yield case(ragged, 5, 4, 32, zeros=True)
    yield case(up, 2, 4, 64, zeros=True, rank=8)
    yield case(up, 20, 2, 64, rank=40)
    yield case(square, 3, 4, rank=136)
    yield case(LLAMA3_8B[1], 16, 4, rank=32)
    yield case(LLAMA3_8B[1], 64, 4, zeros=True, rank=128)
    for linear in (*LLAMA3_8B, *QWEN25_7B):
        for rows in (1, 16, 64, 256, 2048):
            yield case(linear, rows, 4, zeros=True)
    for linear in LLAMA3_8B[2:4]:
        for rows in (1, 16):
            yield case(linear, rows, 3)
            yield case(linear, rows, 2, 64)
            yield case(linear, rows, 8)
            yield case(linear, rows, 4, 64, levels=NF4)


CASES = tuple(_cases())
