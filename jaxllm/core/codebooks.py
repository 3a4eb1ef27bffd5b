"""Sets whose points are learned: k-means codebooks, and sums of scaled planes.

They are used as a ``Grid`` is: ``fit`` gives the parameters of one block, ``snap``
the nearest points, ``pack`` the stored weight.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core.arrays import as_stored, to_rank
from jaxllm.core.formats import TINY
from jaxllm.core.scales import per_entry
from jaxllm.core.weights import Codebook, Planes


@dataclasses.dataclass(frozen=True)
class Centroids:
    """2^bits values per output and block, by k-means weighted with the importance.

    Lloyd's steps from the quantiles of the weights' cumulated importance; values are
    stored as bfloat16. ``block`` inputs share a codebook (None: all of an output).
    """

    bits: int
    block: int | None = None
    steps: int = 30

    filling = 0.0

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"codebooks of {self.bits!r} bits; accepted: 1 to 8")

    def fit(self, block: Float[Array, "n out"], importance, support=None):
        """The codebooks [entries, out] of one block."""
        weight = jnp.broadcast_to(per_entry(importance), block.shape)
        weight = weight / jnp.maximum(weight.mean(0, keepdims=True), TINY) + 1e-6
        if support is not None:
            weight = jnp.where(support, weight, 0.0)
        found = jax.vmap(self._lloyd, (1, 1), 1)(block, weight)
        return as_stored(found)

    def _lloyd(self, w: Float[Array, "n"], weight) -> Float[Array, "entries"]:
        count = 2**self.bits
        order = jnp.argsort(w)
        share = jnp.cumsum(weight[order])
        middle = (np.arange(count, dtype=np.float32) + 0.5) / count
        level = jnp.asarray(middle) * share[-1]
        start = w[order][jnp.clip(jnp.searchsorted(share, level), 0, len(w) - 1)]

        def step(_, centers):
            near = jnp.abs(w[:, None] - centers[None]).argmin(1)
            mass = jax.ops.segment_sum(weight, near, count)
            total = jax.ops.segment_sum(weight * w, near, count)
            return jnp.where(mass > 0, total / jnp.maximum(mass, TINY), centers)

        return jnp.sort(jax.lax.fori_loop(0, self.steps, step, start))

    def snap(self, values: Float[Array, "... out"], params):
        gap = jnp.abs(values[..., None, :] - params)
        best = gap.argmin(-2)[..., None, :]
        return jnp.take_along_axis(params, best, -2)[..., 0, :]

    def pack(self, values: Float[Array, "in out"], params, support, dtype) -> Codebook:
        """The stored weight; ``params`` are [blocks, entries, out]."""
        table = jnp.moveaxis(params, -1, 0).astype(jnp.bfloat16)
        return Codebook.encode(values.T, table, self.block, dtype)


@dataclasses.dataclass(frozen=True)
class DigitPlanes:
    """w = sum_p alpha_p d_p (+ shift), d_p in ``digits``, by alternating least squares.

    From a greedy start (the residual's nearest digits, plane by plane) each step
    takes the best of all combinations of digits for every weight, then the best
    coefficients for these digits; the best step is kept. Coefficients are bfloat16, or
    sums of so many signed ``powers`` of two, the nearest (of the logarithm) of what is
    left one after the other; one power has no sign and takes a byte. ``ridge`` bounds
    the least squares where planes coincide.
    """

    planes: int
    digits: tuple[float, ...] = (-1.0, 1.0)
    block: int | None = None
    shift: bool = False
    steps: int = 20
    powers: int | None = None
    ridge: float = 1e-6

    filling = 0.0

    def __post_init__(self):
        if self.powers is not None and self.powers < 1:
            raise ValueError(f"{self.powers} powers of two; accepted: None, 1 or more")
        if len(self.digits) not in (2, 3):
            raise ValueError(f"digits {self.digits}; accepted: two or three values")
        if not isinstance(self.planes, int) or not 1 <= self.planes <= 4:
            raise ValueError(f"{self.planes!r} planes; accepted: 1 to 4")
        if self.steps < 0:
            raise ValueError(f"{self.steps} steps; accepted: 0 or more")

    @property
    def _combinations(self) -> np.ndarray:
        """All combinations of digits [entries, plane] (with a one for the shift)."""
        every = itertools.product(self.digits, repeat=self.planes)
        return np.array([(*c, *[1.0] * self.shift) for c in every], np.float32)

    def fit(self, block: Float[Array, "n out"], importance, support=None):
        """Coefficients [plane, out] of one block; the shift, if any, comes last."""
        weight = jnp.broadcast_to(per_entry(importance), block.shape)
        weight = weight / jnp.maximum(weight.mean(0, keepdims=True), TINY) + 1e-6
        if support is not None:
            weight = jnp.where(support, weight, 0.0)
        combos = jnp.asarray(self._combinations)

        def step(state, _):
            alpha, best, least = state
            codes = self._nearest(block, alpha)
            d = combos[codes]
            error = block - jnp.einsum("nop,po->no", d, alpha)
            loss = (weight * error**2).sum(0, keepdims=True)
            best = jnp.where(loss < least, alpha, best)
            fitted = self._stored(self._least_squares(d, block, weight))
            return (fitted, best, jnp.minimum(loss, least)), None

        start = self._stored(self._greedy(block, weight))
        state = start, start, jnp.full((1, block.shape[1]), jnp.inf)
        return jax.lax.scan(step, state, length=self.steps + 1)[0][1]

    def _greedy(self, block, weight):
        """One plane after the other on what is left, with the better sign."""
        digits = jnp.asarray(self.digits, jnp.float32)
        total = lambda x: x.sum(0, keepdims=True)  # noqa: E731
        mean = lambda x: total(weight * x) / total(weight)  # noqa: E731
        offset = mean(block) if self.shift else jnp.zeros((1, block.shape[1]))

        def plane(rest, sign):
            """alpha = E[w d] / E[d^2] for the nearest digits d, and what it leaves."""
            scale = sign * jnp.maximum(mean(jnp.abs(rest)), TINY)
            gap = jnp.abs(rest[..., None] / scale[..., None] - digits[None, None])
            d = digits[gap.argmin(-1)]
            alpha = mean(rest * d) / jnp.maximum(mean(d * d), TINY)
            return alpha, rest - alpha * d

        rest, found = block - offset, []
        for _ in range(self.planes):
            (up, above), (down, below) = plane(rest, 1.0), plane(rest, -1.0)
            first = mean(above**2) <= mean(below**2)
            found.append(jnp.where(first, up, down))
            rest = jnp.where(first, above, below)
        return jnp.concatenate((*found, *[offset] * self.shift))

    def _least_squares(self, d, block, weight):
        """argmin over alpha of sum weight (w - d alpha)^2, per output."""
        gram = jnp.einsum("nop,nom,no->opm", d, d, weight)
        eye = jnp.eye(gram.shape[-1]) * self.ridge * len(block)
        right = jnp.einsum("nop,no,no->op", d, block, weight)
        return jnp.linalg.solve(gram + eye[None], right[..., None])[..., 0].T

    def _stored(self, alpha):
        """Coefficients as they are kept."""
        kept = alpha[: self.planes]
        if self.powers == 1:
            kept = _power(jnp.abs(kept))
        elif self.powers:
            rest = kept
            for _ in range(self.powers):
                rest = rest - _power(rest)
            kept = kept - rest
        return jnp.concatenate((as_stored(kept), as_stored(alpha[self.planes :])))

    def _nearest(self, values: Float[Array, "... out"], alpha):
        """The best combination for each value; ``alpha`` is [..., plane, out]."""
        combos = self._combinations
        best, least = (
            jnp.zeros(values.shape, jnp.uint8),
            jnp.full(values.shape, jnp.inf),
        )
        for i, combo in enumerate(combos):
            entry = jnp.einsum("p,...po->...o", combo, alpha)
            gap = jnp.abs(values - to_rank(entry, values.ndim))
            best, least = jnp.where(gap < least, i, best), jnp.minimum(gap, least)
        return best.astype(jnp.uint8)

    def snap(self, values: Float[Array, "... out"], params):
        d = jnp.asarray(self._combinations)[self._nearest(values, params)]
        return jnp.einsum("...op,...po->...o", d, params)

    def pack(self, values: Float[Array, "in out"], params, support, dtype) -> Planes:
        """The stored weight; ``params`` are [blocks, plane, out]."""
        block = min(self.block or len(values), len(values))
        mine = params[jnp.arange(len(values)) // block]
        codes = self._nearest(values, mine).T
        base = len(self.digits)
        places = [base ** (self.planes - 1 - p) for p in range(self.planes)]
        digits = jnp.stack([codes // jnp.uint8(n) % jnp.uint8(base) for n in places])
        alpha = jnp.transpose(params[:, : self.planes], (2, 0, 1))
        alpha = alpha.astype("float8_e8m0fnu" if self.powers == 1 else "bfloat16")
        shift = params[:, -1].T.astype(jnp.bfloat16) if self.shift else None
        return Planes.encode(digits, alpha, shift, self.digits, self.block, dtype)


def _power(x):
    """The signed power of two nearest in logarithm; of what is almost zero, zero."""
    size = jnp.abs(x)
    power = 2.0 ** jnp.round(jnp.log2(jnp.maximum(size, TINY)))
    return jnp.where(size > TINY, jnp.sign(x) * power, 0.0)
