"""y = x W for packed codes and tables of values per output and block of inputs."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float
from pallas_kernels.planes import Planes, block_count, check_planes, unpack


def check(x, planes, table, bits: int, block: int | None) -> None:
    """ValueError names the argument that does not fit the others."""
    inputs = x.shape[-1]
    outputs, blocks = check_planes(planes, inputs, bits), block_count(inputs, block)
    if table.shape[:-1] != (outputs, blocks) or table.shape[-1] > 2**bits:
        raise ValueError(
            f"table {table.shape}; accepted: {(outputs, blocks)} and up to {2**bits} "
            "entries"
        )


def table_matmul(
    x: Float[Array, "*batch in"],
    planes: Planes,
    table: Float[Array, "out blocks entries"],
    *,
    bits: int,
    block: int | None,
) -> Float[Array, "*batch out"]:
    """y[m, n] = sum_k x[m, k] table[n, k / block, code[n, k]].

    ``planes`` hold the codes as ``quantized_matmul`` does; ``block`` inputs of an
    output share a table (None: all), the last block may be short. These are codebooks
    learned per output (SqueezeLLM, arXiv:2306.07629) and floats whose special value
    is chosen per group (BitMoD, arXiv:2411.11745). Sums are float32; the result has
    the dtype of ``x``.
    """
    check(x, planes, table, bits, block)
    inputs = x.shape[-1]
    codes = unpack(planes, bits, inputs).astype(jnp.int32)
    size = inputs if block is None else block
    short = table.shape[1] * size - inputs
    codes = jnp.pad(codes, ((0, 0), (0, short))).reshape(*table.shape[:2], size)
    w = jnp.take_along_axis(table, codes, -1).astype(jnp.float32)
    w = w.reshape(len(w), table.shape[1] * size)[:, :inputs]
    return jnp.einsum("...k,nk->...n", x.astype(jnp.float32), w).astype(x.dtype)
