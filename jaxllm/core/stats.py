"""Calibration statistics: monoids over batches of a layer's input.

Each statistic has ``of(x, weights)`` for inputs ``x`` [tokens, in] (float32) with
``weights`` [tokens], ``a + b`` for two batches, and ``through(op)`` for the statistic
of ``op.apply(x)`` where that is known without the inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.arrays import Leaf

_node = jax.tree_util.register_dataclass


@_node
@dataclasses.dataclass(frozen=True)
class Gram:
    """Sum of x xT and the number of tokens; the Hessian of a linear layer's error."""

    total: Leaf[Float[Array, "... in in"]]
    count: Leaf[Float[Array, "..."]]

    @classmethod
    def of(cls, x, weights) -> Gram:
        return cls((x * weights[:, None]).T @ x, weights.sum())

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.total + other.total, self.count + other.count)

    def through(self, op) -> Gram:
        """``op`` is linear: rows and columns of x xT go through it alike."""
        half = op.apply(self.total)
        return Gram(op.apply(jnp.swapaxes(half, -1, -2)), self.count)

    @property
    def mean(self) -> Array:
        """E[x xT], [in, in]."""
        return self.total / jnp.maximum(self.count, 1.0)[..., None, None]


@_node
@dataclasses.dataclass(frozen=True)
class AbsMax:
    """Largest magnitude of each input channel, [in]."""

    value: Leaf[Float[Array, "... in"]]

    @classmethod
    def of(cls, x, weights) -> AbsMax:
        return cls(jnp.where(weights[:, None] > 0, jnp.abs(x), 0.0).max(0))

    def __add__(self, other: AbsMax) -> AbsMax:
        return AbsMax(jnp.maximum(self.value, other.value))

    def through(self, op) -> AbsMax:
        if not op.diagonal:
            raise ValueError(f"channel ranges are unknown after {type(op).__name__}")
        return AbsMax(jnp.abs(op.apply(self.value)))


@_node
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums of |x|, x and x^2 per channel [in], and the number of tokens."""

    absolute: Leaf[Float[Array, "... in"]]
    first: Leaf[Float[Array, "... in"]]
    second: Leaf[Float[Array, "... in"]]
    count: Leaf[Float[Array, "..."]]

    @classmethod
    def of(cls, x, weights) -> Moments:
        total = lambda v: (v * weights[:, None]).sum(0)  # noqa: E731
        return cls(total(jnp.abs(x)), total(x), total(x * x), weights.sum())

    def __add__(self, other: Moments) -> Moments:
        return jax.tree.map(jnp.add, self, other)

    def through(self, op) -> Moments:
        if not op.diagonal:
            raise ValueError(f"channel moments are unknown after {type(op).__name__}")
        scale = op.apply(jnp.ones_like(self.first))
        return Moments(
            self.absolute * jnp.abs(scale),
            self.first * scale,
            self.second * scale**2,
            self.count,
        )

    def _mean(self, total: Array) -> Array:
        return total / jnp.maximum(self.count, 1.0)[..., None]

    @property
    def mean_absolute(self) -> Array:
        return self._mean(self.absolute)

    @property
    def mean_square(self) -> Array:
        return self._mean(self.second)

    @property
    def mean(self) -> Array:
        return self._mean(self.first)

    @property
    def variance(self) -> Array:
        """E[x^2] - E[x]^2, at least zero."""
        return jnp.maximum(self.mean_square - self.mean**2, 0.0)


@_node
@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of log2|x| over fixed edges (eighths of an octave, 2^-16 to 2^16)."""

    counts: Leaf[Float[Array, "... bins"]]

    BINS = 256
    STEP = 8
    LOW = -16.0

    @classmethod
    def of(cls, x, weights) -> Histogram:
        octave = jnp.log2(jnp.maximum(jnp.abs(x), 2.0**cls.LOW))
        index = jnp.clip(jnp.ceil((octave - cls.LOW) * cls.STEP), 0, cls.BINS - 1)
        spread = jnp.broadcast_to(weights[:, None], x.shape)
        zero = jnp.zeros(cls.BINS, jnp.float32)
        return cls(zero.at[index.astype(jnp.int32)].add(spread))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)

    def through(self, op) -> Histogram:
        raise ValueError(f"a histogram is unknown after {type(op).__name__}")

    def quantile(self, fraction: float) -> Array:
        """Upper edge of the bin that holds the given fraction of |x|."""
        share = jnp.cumsum(self.counts, -1) / self.counts.sum(-1, keepdims=True)
        index = jnp.argmax(share >= fraction, -1)
        return 2.0 ** (self.LOW + index / self.STEP)


@_node
@dataclasses.dataclass(frozen=True)
class Fisher:
    """Sum of squared gradients of a weight [in, out] and the number of sequences.

    Found by a pass of its own (``core.gradients``), not from a layer's input.
    """

    total: Leaf[Float[Array, "... in out"]]
    count: Leaf[Float[Array, "..."]]

    def through(self, op) -> Fisher:
        raise ValueError(f"gradients are unknown after {type(op).__name__}")

    @property
    def mean(self) -> Array:
        return self.total / jnp.maximum(self.count, 1.0)[..., None, None]


@_node
@dataclasses.dataclass(frozen=True)
class Samples:
    """The inputs themselves [tokens, in] with their weights, of one batch."""

    x: Leaf[Float[Array, "... tokens in"]]
    weights: Leaf[Float[Array, "... tokens"]]

    @classmethod
    def of(cls, x, weights) -> Samples:
        return cls(x, weights)


@_node
@dataclasses.dataclass(frozen=True)
class Drift:
    """Sum of (x~ - x) xT, x~ the input that the dense model would give here.

    Found by the walk, which then carries the dense stream along.
    """

    total: Leaf[Float[Array, "... in in"]]
    count: Leaf[Float[Array, "..."]]

    @classmethod
    def between(cls, seen: Samples, dense: Samples) -> Drift:
        shift = (dense.x - seen.x) * seen.weights[..., None]
        return cls(jnp.swapaxes(shift, -1, -2) @ seen.x, seen.weights.sum(-1))

    @classmethod
    def of(cls, x, weights) -> Drift:
        """That of a stream which has not drifted."""
        return cls.between(Samples(x, weights), Samples(x, weights))

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.total + other.total, self.count + other.count)

    def through(self, op) -> Drift:
        half = op.apply(self.total)
        return Drift(
            jnp.swapaxes(op.apply(jnp.swapaxes(half, -1, -2)), -1, -2), self.count
        )

    @property
    def mean(self) -> Array:
        return self.total / jnp.maximum(self.count, 1.0)[..., None, None]


KINDS: dict[str, Any] = dict(
    gram=Gram,
    absmax=AbsMax,
    moments=Moments,
    histogram=Histogram,
    samples=Samples,
    drift=Drift,
)


@_node
@dataclasses.dataclass(frozen=True)
class Stats:
    """The statistics of one layer input by name; adding and mapping go to each."""

    items: dict[str, Any]

    @classmethod
    def of(cls, names: tuple[str, ...], x, weights=None) -> Stats:
        """Statistics of inputs ``x`` [..., in]; ``weights`` [...] default to one."""
        unknown = set(names) - KINDS.keys()
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known: {[*KINDS]}")
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        flat = jnp.ones(len(rows)) if weights is None else weights.reshape(-1)
        return cls({n: KINDS[n].of(rows, flat.astype(jnp.float32)) for n in names})

    def __add__(self, other: Stats) -> Stats:
        return Stats({n: s + other.items[n] for n, s in self.items.items()})

    def through(self, op) -> Stats:
        return Stats({n: s.through(op) for n, s in self.items.items()})

    def pooled(self, minimum: float) -> Stats:
        """Experts (leading axis) with fewer tokens get the sum over all experts."""
        counts = [s.count for s in self.items.values() if hasattr(s, "count")]
        if not counts:
            return self
        few = counts[0] < minimum

        def fill(leaf):
            total = jnp.broadcast_to(leaf.sum(0, keepdims=True), leaf.shape)
            return jnp.where(few.reshape(-1, *[1] * (leaf.ndim - 1)), total, leaf)

        additive = {
            n: jax.tree.map(fill, s) for n, s in self.items.items() if n != "absmax"
        }
        return Stats({**self.items, **additive})

    def __getattr__(self, name: str):
        items = object.__getattribute__(self, "items")
        if name in items:
            return items[name]
        raise AttributeError(f"statistic {name!r} was not collected; have {[*items]}")


def output_energy(
    gram: Float[Array, "*experts in in"],
    w: Float[Array, "*experts in out"],
    probes: int | None = None,
) -> Float[Array, ""]:
    """tr(WT H W): the mean square of x W, summed over outputs, for H = E[x xT];
    experts' are added up.

    More than 8 ``probes`` outputs are measured on so many sums of them with random
    signs, without bias (Hutchinson's estimate): W's errors differ in sign from output
    to output, so that few probes tell nearly all, and H meets few columns.
    """
    if probes is not None and w.shape[-1] > 8 * probes:
        signs = jax.random.rademacher(jax.random.key(0), (w.shape[-1], probes), w.dtype)
        w = w @ signs / probes**0.5
    return (w * (gram @ w)).sum()


def abstract_stats(needs: tuple[str, ...], shape: tuple[int, ...]) -> Stats:
    """Shapes of the statistics in front of a weight [..., in, out]."""
    x = jax.ShapeDtypeStruct((1, shape[-2]), jnp.float32)
    walked = tuple(n for n in needs if n != "fisher")
    of = lambda x: Stats.of(walked, x)  # noqa: E731
    for _ in shape[:-2]:
        of = jax.vmap(of)
        x = jax.ShapeDtypeStruct((shape[0], *x.shape), x.dtype)
    found = jax.eval_shape(of, x)
    if "fisher" not in needs:
        return found
    full = jax.ShapeDtypeStruct(shape, jnp.float32)
    count = jax.ShapeDtypeStruct(shape[:-2], jnp.float32)
    return Stats({**found.items, "fisher": Fisher(full, count)})
