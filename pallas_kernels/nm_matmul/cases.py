"""Named inputs: 2:4 and 4:8, float and 4-bit values, decode row counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.cases import linear_case
from pallas_kernels.quantized_matmul.cases import factors
from pallas_kernels.shapes import LLAMA3_8B, TINY, Linear


def make(
    key, *, rows: int, linear: Linear, n: int, m: int, bits, block, zeros, rank, dtype
):
    """Random supports with n of every m inputs, values or codes in order, factors."""
    keys = iter(jax.random.split(key, 8))
    inputs, outputs = linear.inputs, linear.outputs
    x = jax.random.normal(next(keys), (rows, inputs), dtype)
    order = jax.random.uniform(next(keys), (outputs, inputs // m, m))
    flags = (jnp.argsort(jnp.argsort(order)) < n).reshape(outputs, -1)
    padded = jnp.pad(flags, ((0, 0), (0, -inputs % 8)))
    bytes_ = padded.reshape(outputs, -1, 8).astype(jnp.uint8)
    mask = (bytes_ << jnp.arange(8, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)
    kept, unit = inputs // m * n, jnp.asarray((inputs * n / m) ** -0.5, dtype)
    if bits is None:
        return x, mask, jax.random.normal(next(keys), (outputs, kept), dtype) * unit
    plane = jax.random.bits(next(keys), (outputs, -(-kept * bits // 8)), jnp.uint8)
    blocks = 1 if block is None else -(-inputs // block)
    scale = jax.random.uniform(next(keys), (outputs, blocks), dtype, 0.5, 1.5)
    arguments = x, mask, (plane,), scale * unit
    zero = None
    if zeros:
        zero = jax.random.randint(next(keys), scale.shape, 0, 2**bits).astype(jnp.uint8)
    arguments = *arguments, zero
    return (*arguments, factors(next(keys), linear, rank)) if rank else arguments


def case(linear, rows, n=2, m=4, bits=None, block=None, zeros=False, rank=0):
    """One case; its name says everything that its inputs depend on."""
    kind = "float" if bits is None else f"w{bits}-g{block}{'-asym' * zeros}"
    kind += f"-rank{rank}" if rank else ""
    options = {"n": n, "m": m, "bits": bits, "block": block}
    inputs = dict(rows=rows, zeros=zeros, rank=rank, work=n / m, **options)
    return linear_case(linear, f"{n}of{m}-{kind}", make, options, **inputs)


def _cases():
    square, up, ragged = TINY
    wide = Linear("tiny", "wide", 1024, 64)
    yield case(square, 1)
    yield case(wide, 3, bits=4, block=128)
    yield case(wide, 2, 4, 8)
    yield case(up, 20, 4, 8, 4, 64)
    yield case(square, 2, bits=4, block=64, zeros=True)
    yield case(ragged, 5, 1, 4)
    yield case(wide, 2, bits=4, block=128, rank=8)
    for linear in LLAMA3_8B[:4]:
        yield case(linear, 1)
        yield case(linear, 1, bits=4, block=128)
    for rows in (16, 64):
        yield case(LLAMA3_8B[2], rows)
        yield case(LLAMA3_8B[2], rows, bits=4, block=128)
    yield case(LLAMA3_8B[2], 1, bits=4, block=128, zeros=True)
    yield case(LLAMA3_8B[2], 16, bits=4, block=128, rank=32)
    yield case(LLAMA3_8B[2], 1, 4, 8)
    yield case(LLAMA3_8B[2], 1, 4, 8, 4, 128)


CASES = tuple(_cases())
