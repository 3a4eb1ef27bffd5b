"""Families of learned equivalences: scale and shift, affine per head, Kronecker."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.equivalences import (
    balance,
    fold,
    input_channels,
    producer_channels,
    shiftable,
)
from jaxllm.core.learned import Equivalence
from jaxllm.core.migration import centred
from jaxllm.core.model import Params, Site, get, put
from jaxllm.core.spec import expression
from jaxllm.core.stiefel import cayley
from jaxllm.core.weights import Kronecker, Transformed


@expression
def scaling(alpha: float = 0.5, shift: bool = True):
    """x~ = (x - z) / s where a norm or the values take it (OmniQuant, eq. 3).

    At first s = max|x - z|^alpha / max|w|^(1 - alpha) and z is the middle of each
    channel's range; log s is learned, which keeps s positive. The input of the second
    feed-forward matrix stays as it is.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}; accepted: 0 to 1")

    def start(ws, site: Site, samples, key):
        if not shiftable(site):
            return {}
        middle, peak = centred(site, samples, shift)
        theta = dict(scale=jnp.log(balance(site, ws, peak, alpha)))
        if shift:
            theta["shift"] = middle
        return {name: producer_channels(site, value) for name, value in theta.items()}

    def change(theta, params, site: Site, progress):
        factor = jnp.exp(-input_channels(site, theta["scale"]))
        z = input_channels(site, theta["shift"]) if shift else None
        return fold(params, site, factor, z)

    return Equivalence(start, change)


def _of_values(site: Site) -> bool:
    """Whether attention mixes the site's input from values, head by head."""
    return site.kind == "linear" and site.head_dim > 1 and site.producer is not None


@expression
def affine(alpha: float = 0.5, shift: bool = True, share: float = 0.5):
    """x~ = (x - z) A^-1, A W with A full within each head of the values (AffineQuant).

    A = diag(s) (I + E), arXiv:2403.12544, eq. 2 to 6: the gradual mask lets entries
    |i - j| <= progress (d - 1) of E be non-zero. A row of E adds up to less than
    ``share`` < 1 whatever is learned, so that I + E is strictly diagonally dominant
    (Levy-Desplanques) and its condition below (1 + share) / (1 - share); the paper
    scales E by a small factor instead. Behind norms A is diagonal, which costs nothing.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share}; accepted: 0 < share < 1")
    plain = scaling(alpha, shift).call

    def start(ws, site: Site, samples, key):
        theta = plain.start(ws, site, samples, key)
        if theta and _of_values(site):
            heads = len(theta["scale"]) // site.head_dim
            theta["mix"] = jnp.zeros((heads, site.head_dim, site.head_dim))
        return theta

    def change(theta, params, site: Site, progress):
        params = plain.change(theta, params, site, progress)
        if "mix" not in theta:
            return params
        inner = _dominant(theta["mix"], share, progress)
        return through_heads(params, site, jnp.linalg.inv(inner), inner)

    return Equivalence(start, change)


def _dominant(mix, share: float, progress):
    """I + E, [heads, d, d]: E banded, its rows below ``share`` in absolute sum."""
    d = mix.shape[-1]
    place = jnp.arange(d, dtype=jnp.float32)
    apart = jnp.abs(place[:, None] - place[None])
    band = (apart > 0) & (apart <= jnp.floor(progress * (d - 1)))
    mixed = jnp.tanh(mix) * share / max(d - 1, 1)
    return jnp.where(band[None], mixed, 0.0) + jnp.eye(d)[None]


def through_heads(params: Params, site: Site, forward, back) -> Params:
    """Each head's values through ``forward`` [heads, d, d], and o through ``back``.

    ``back`` is the inverse of ``forward``; query heads share their values' matrix.
    """
    d = site.head_dim

    def turned(v):
        heads = v.reshape(*v.shape[:-1], -1, d)
        return jnp.einsum("...hd,hde->...he", heads, forward).reshape(v.shape)

    producer = site.producer or ""  # a site of values has one: see _of_values
    group = get(params, producer)
    params = put(params, producer, {n: turned(v) for n, v in group.items()})
    wide = jnp.repeat(back, site.repeat, 0)
    for path in site.consumers:
        w = get(params, f"{path}.weight")
        rows = w.reshape(-1, d, w.shape[-1])
        made = jnp.einsum("hde,heo->hdo", wide, rows).reshape(w.shape)
        params = put(params, f"{path}.weight", made)
    return params


@expression
def kronecker(alpha: float = 0.3):
    """(x / s) (L (x) R) in front of a site, (L (x) R)^-1 s W behind (FlatQuant).

    arXiv:2410.09426, section 3.1: s starts as max|x|^alpha / max|w|^(1 - alpha) and is
    folded into the producer where there is one. The sides of L and R are the nearest
    two factors of the width; in front of o, L mixes heads and R, within heads, is
    folded into v. Each matrix is U diag(exp tanh t) V with U, V Cayley transforms,
    random at first: its condition stays below e^2 (the paper learns the diagonal
    itself). It is stored as bfloat16.
    """
    plain = scaling(alpha, False).call

    def start(ws, site: Site, samples, key):
        width, d = len(ws[0]), site.head_dim
        sides = (width // d, d) if _of_values(site) else nearest_factors(width)
        keys = jax.random.split(key)
        left, right = (_free(k, n) for k, n in zip(keys, sides, strict=True))
        theta: dict[str, Any] = dict(left=left, right=right)
        if site.producer is not None and site.exclusive and not _of_values(site):
            peak = centred(site, samples, False)[1]
            theta["scale"] = jnp.log(balance(site, ws, peak, alpha))
        return theta

    def change(theta, params, site: Site, progress):
        left, right = (_matrix(theta[side]) for side in ("left", "right"))
        if "scale" in theta:
            params = plain.change(theta, params, site, progress)
        if not _of_values(site):
            return in_front(params, site, Kronecker(left, right))
        heads = get(params, f"{site.producer}.weight").shape[-1] // site.head_dim
        forward = jnp.broadcast_to(right.astype(jnp.float32), (heads, *right.shape))
        params = through_heads(params, site, forward, jnp.linalg.inv(forward))
        return in_front(params, site, Kronecker(left))

    return Equivalence(start, change)


def nearest_factors(width: int) -> tuple[int, int]:
    """a <= b with a b = width and a as large as possible.

    >>> nearest_factors(172)
    (4, 43)
    """
    small = next(a for a in range(math.isqrt(width), 0, -1) if width % a == 0)
    return small, width // small


def _free(key, size: int) -> dict:
    """What is learned of one matrix; X - XT has a spectral radius of 2 at first."""
    u, v = jax.random.normal(key, (2, size, size)) * (2 * size) ** -0.5
    return dict(u=u, v=v, stretch=jnp.zeros(size))


def _matrix(theta):
    """U diag(exp tanh t) V, as stored."""
    stretch = jnp.exp(jnp.tanh(theta["stretch"]))
    made = cayley(theta["u"]) @ (stretch[:, None] * cayley(theta["v"]))
    return made.astype(jnp.bfloat16)


def in_front(params: Params, site: Site, op: Kronecker) -> Params:
    """Consumers that read op(x), with the inverse in their weights."""
    undo = op.inverted()
    for path in site.consumers:
        w = get(params, f"{path}.weight")
        made = Transformed(op, undo.rows(w))
        params = put(params, f"{path}.weight", made)
    return params
