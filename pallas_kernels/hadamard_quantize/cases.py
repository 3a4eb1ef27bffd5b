"""Named inputs: the widths of real models, Hadamard and learned factors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.op import Case


def make(key, *, rows: int, width: int, a: int, b: int, dtype):
    """Normal rows with some large channels; random factors of unit gain."""
    one, two, three = jax.random.split(key, 3)
    x = jax.random.normal(one, (rows, width), dtype)
    x = x.at[:, :: max(1, width // 8)].multiply(20)
    left = jax.random.normal(two, (a, a)) * a**-0.5
    right = jax.random.normal(three, (b, b)) * b**-0.5
    return x, left.astype(dtype), right.astype(dtype)


def case(name: str, rows: int, width: int, a: int, b: int, bits: int):
    """One case; its name says everything that its inputs depend on."""
    tiny = name == "tiny"
    return Case(
        f"{name}/{width}-{a}x{b}-int{bits}/m{rows}",
        functools.partial(
            make,
            rows=rows,
            width=width,
            a=a,
            b=b,
            dtype=jnp.float32 if tiny else jnp.bfloat16,
        ),
        {"bits": bits},
        tiny=tiny,
        flops=2.0 * rows * width * (a + b),
    )


def _cases():
    yield case("tiny", 3, 256, 2, 128, 8)
    yield case("tiny", 20, 512, 4, 128, 4)
    yield case("tiny", 5, 384, 3, 128, 8)
    yield case("tiny", 2, 172, 4, 43, 8)
    for rows in (1, 16, 2048):
        for bits in (8, 4):
            yield case("llama3-8b", rows, 4096, 32, 128, bits)
            yield case("llama3-8b", rows, 14336, 112, 128, bits)
    yield case("qwen2.5-7b", 16, 3584, 28, 128, 8)
    yield case("qwen2.5-7b", 16, 18944, 148, 128, 8)


CASES = tuple(_cases())
