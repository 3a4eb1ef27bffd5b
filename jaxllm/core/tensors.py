"""Factorizations beyond one product: tensor trains, and sparse plus low-rank."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core import metrics, weights
from jaxllm.core.solvers import factorize
from jaxllm.core.spec import expression
from jaxllm.core.splits import kept_apart
from jaxllm.core.weights import MPO, Sum

SUPPORTS = ("random", "largest")


def digits(count: int, sites: int) -> tuple[int, ...]:
    """``count`` as a product of ``sites`` divisors, each near the root that is left.

    >>> digits(64, 2), digits(172, 2), digits(7, 3)
    ((8, 8), (4, 43), (1, 1, 7))
    """
    found = []
    for left in range(sites, 1, -1):
        goal = math.log(count) / left
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        best = min(divisors, key=lambda d: (round(abs(math.log(d) - goal), 9), d))
        found.append(best)
        count //= best
    return (*found, count)


@expression
def tensor_train(ratio: float, sites: int = 2):
    """The matrix product operator that successive truncated SVDs give.

    W[in, out] becomes a tensor [i1, o1, i2, o2 ..]; each SVD splits off one core, with
    at most ``bond`` singular values. The bond is the largest one whose cores take the
    share ``ratio`` of the dense parameters at most (CompactifAI, arXiv:2401.14109).
    """
    if not 0 < ratio <= 1 or sites < 2:
        raise ValueError(f"ratio {ratio}, sites {sites}; accepted: (0, 1], at least 2")

    def solve(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("a matrix product operator cannot keep a sparse support")
        shape = digits(w.shape[0], sites), digits(w.shape[1], sites)
        bond = largest_bond(shape, ratio * w.size)
        cores = train(w.astype(jnp.float32), shape, bond)
        return MPO(tuple(core.astype(w.dtype) for core in cores))

    return solve


def _bonds(shape, bond: int) -> list[int]:
    """All bonds, the outer ones included, when inner ones are at most ``bond``."""
    sizes = [i * o for i, o in zip(*shape, strict=True)]
    left, right = [1], [1]
    for size in sizes:
        left.append(min(left[-1] * size, bond))
    for size in reversed(sizes):
        right.append(min(right[-1] * size, bond))
    inner = [min(a, b) for a, b in zip(left, reversed(right), strict=True)]
    return [1, *inner[1:-1], 1]


def largest_bond(shape, budget: float) -> int:
    """The largest bond whose cores have at most ``budget`` entries."""
    sizes = [i * o for i, o in zip(*shape, strict=True)]

    def entries(bond: int) -> int:
        b = _bonds(shape, bond)
        return sum(b[k] * size * b[k + 1] for k, size in enumerate(sizes))

    if entries(1) > budget:
        raise ValueError(f"{budget:,.0f} entries; a bond of one takes {entries(1):,}")
    bond = 1
    while entries(bond + 1) <= budget and entries(bond + 1) > entries(bond):
        bond += 1
    return bond


def train(w: Float[Array, "in out"], shape, bond: int) -> list[Array]:
    """The cores [left, in, out, right], from the first to the last."""
    inner, outer = shape
    sites = len(inner)
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    rest = w.reshape(*inner, *outer).transpose(order)
    bonds, cores = _bonds(shape, bond), []
    for k in range(sites - 1):
        rest = rest.reshape(bonds[k] * inner[k] * outer[k], -1)
        u, s, vt = jnp.linalg.svd(rest, full_matrices=False)
        keep = bonds[k + 1]
        cores.append(u[:, :keep].reshape(bonds[k], inner[k], outer[k], keep))
        rest = s[:keep, None] * vt[:keep]
    return [*cores, rest.reshape(bonds[-2], inner[-1], outer[-1], 1)]


@expression
def low_rank_plus_sparse(
    ratio: float,
    density: float = 0.03,
    support: str = "random",
    metric=metrics.identity(),
    steps: int = 10,
):
    """W = B A + S: a product and a few entries, fitted in turn (SLTrain's form).

    S has ``density`` of the entries: a ``random`` support that never changes, or the
    ``largest`` of what the product leaves. Then S = (W - B A) on its support and
    B A = the best product for W - S, ``steps`` times. The rank is what is left of the
    share ``ratio`` of the dense weight's bytes.
    """
    if not 0 < density < 1 or support not in SUPPORTS or steps < 1:
        raise ValueError(
            f"density {density}, support {support!r}, steps {steps}; accepted: between "
            f"0 and 1, {' or '.join(map(repr, SUPPORTS))}, at least 1"
        )

    def solve(w, stats, key=None, given=None):
        if given is not None:
            raise TypeError("a low-rank product cannot keep a sparse support")
        dense, count = w.astype(jnp.float32), max(1, int(density * w.size))
        draw = jax.random.uniform(jax.random.key(0) if key is None else key, w.shape)
        few = jax.eval_shape(lambda: kept_apart(w, draw, count))
        left = ratio * w.size * w.dtype.itemsize - weights.nbytes(few)
        rank = int(left // (sum(w.shape) * w.dtype.itemsize))
        if rank < 1:
            raise ValueError(f"{ratio} of a {w.shape} weight leaves no rank")
        cost, sparse = metric(stats, len(w)), jnp.zeros_like(dense)
        for _ in range(steps):
            product = factorize(dense - sparse, cost, rank)
            error = dense - product.materialize()
            score = draw if support == "random" else jnp.abs(error)
            few = kept_apart(error.astype(w.dtype), score, count)
            sparse = few.materialize().astype(jnp.float32)
        cast = lambda x: x.astype(w.dtype)  # noqa: E731
        return Sum((jax.tree.map(cast, product), few))

    return solve
