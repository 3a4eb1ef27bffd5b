"""y = x W over the blocks of inputs that a gate left open."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Int


def check(x, w, index, block: int) -> None:
    """ValueError names the argument that does not fit the others."""
    inputs = x.shape[-1]
    if len(w) != inputs:
        raise ValueError(f"x has {inputs} inputs, the weight {len(w)}")
    if block < 1 or inputs % block:
        raise ValueError(f"blocks of {block} do not divide {inputs} inputs")
    if index.ndim != 1 or len(index) > inputs // block:
        raise ValueError(
            f"index {index.shape}; accepted: at most {inputs // block} block numbers"
        )


def gated_matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "in out"],
    index: Int[Array, "slots"],
    count: Int[Array, ""],
    *,
    block: int = 128,
) -> Float[Array, "*batch out"]:
    """y[m, n] = sum_{i < count} sum_{k in block index[i]} x[m, k] w[k, n].

    ``index`` numbers blocks of ``block`` inputs, each at most once; only its first
    ``count`` entries are read (0 gives zeros), so that the number of active blocks may
    vary under ``jit`` while its bound, the length of ``index``, does not. The gate is
    shared by all rows: at decode, the union of what the rows keep. Inputs that the
    gate closes inside an active block are zeros of ``x``: with all blocks of a
    non-zero input listed, y is exactly x W. WINA (arXiv:2505.19427) scores inputs by
    |x| times the norm of their weight column one by one; blocks are this op's.
    ``w`` is a plain array as models hold it: the rows of a block are neighbours.
    Sums are float32; the result has the dtype of ``x``.
    """
    check(x, w, index, block)
    blocks = x.shape[-1] // block
    listed = jnp.arange(len(index)) < count
    active = jnp.zeros(blocks, jnp.float32).at[index].add(listed.astype(jnp.float32))
    gate = jnp.repeat(active, block).reshape((1,) * (x.ndim - 1) + (-1,))
    left, right = x.astype(jnp.float32) * gate, w.astype(jnp.float32)
    return jnp.einsum("...k,kn->...n", left, right).astype(x.dtype)
