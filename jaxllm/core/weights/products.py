"""Integer products of rounded inputs with packed codes, with or without groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxllm.core.packing import Planes, parts
from pallas_kernels.plane_product import op as plane_product


def splits_evenly(block: int, bits: int) -> bool:
    """Whether groups of ``block`` codes begin at whole bytes of every plane."""
    return all(block * part % 8 == 0 for part in parts(bits))


def code_product(
    codes: Int8[Array, "*batch in"],
    planes: Planes,
    scale: Float[Array, "*batch blocks"],
    w_scale: Float[Array, "out blocks"],
    *,
    bits: int,
    offset: int,
    block: int | None,
    out_dtype,
) -> Float[Array, "*batch out"]:
    """y = sum over blocks of scale w_scale sum codes (code - offset).

    The inner sums are exact in int32; those of the blocks meet in float32, one block
    after the other. A short last block is filled with zeros.
    """
    options = dict(bits=bits, offset=offset)
    if block is None:
        return plane_product(
            codes, planes, scale, w_scale, out_dtype=out_dtype, **options
        )

    def add(total, each):
        left, planes, theirs, ours = each
        sides = theirs[..., None], ours[:, None]
        y = plane_product(left, planes, *sides, out_dtype=jnp.float32, **options)
        return total + y, None

    count = w_scale.shape[-1]
    widths = [block * part // 8 for part in parts(bits)]
    each = (
        _cut(codes, count, block),
        tuple(_cut(p, count, n) for p, n in zip(planes, widths, strict=True)),
        jnp.moveaxis(scale, -1, 0),
        w_scale.T,
    )
    start = jnp.zeros((*codes.shape[:-1], len(w_scale)), jnp.float32)
    return jax.lax.scan(add, start, each)[0].astype(out_dtype)


def _cut(x, count: int, size: int):
    """The last axis in ``count`` runs of ``size``, which come first."""
    short = count * size - x.shape[-1]
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return jnp.moveaxis(filled.reshape(*x.shape[:-1], count, size), -2, 0)
