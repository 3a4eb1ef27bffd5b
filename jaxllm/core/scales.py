"""Scale rules: from the weights of one block to its scale and zero point.

A rule is called as ``rule(block, format, importance) -> (scale, zero)`` with a block
[inputs, out] in float32 and the importance [inputs] of each input (mean square, one
where nothing is known) or of each weight [inputs, out]; it returns [out] each,
``zero`` None for symmetric formats.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.core.arrays import as_stored, peak
from jaxllm.core.formats import TINY, Choice, Format
from jaxllm.core.spec import expression
from jaxllm.core.weights import Quantized


def _range(block, format: Format, shrink=1.0):
    """Scale and zero point that cover the block, shrunk toward zero."""
    if isinstance(format, Choice):
        raise ValueError(f"{format} has several tables: use best_table")
    if format.symmetric:
        peak = jnp.abs(block).max(0)
        return jnp.maximum(peak * shrink / format.largest, TINY), None
    low = jnp.minimum(block.min(0), 0) * shrink
    high = jnp.maximum(block.max(0), 0) * shrink
    scale = jnp.maximum((high - low) / (format.codes - 1), TINY)
    return scale, jnp.clip(jnp.round(-low / scale), 0, format.codes - 1)


def per_entry(importance):
    """The importance of inputs [in] as that of weights [in, 1], or as it is."""
    return importance[:, None] if importance.ndim == 1 else importance


@expression
def absmax():
    """The range of the block: absmax (symmetric) or min and max (asymmetric)."""
    return lambda block, format, importance: _range(block, format)


@expression
def span():
    """From the least to the greatest value, whether or not zero lies between them.

    The zero point is real: a grid of positive values begins at their least.
    """

    def rule(block, format, importance):
        real = per_entry(importance) > 0
        low = jnp.where(real, block, jnp.inf).min(0)
        high = jnp.where(real, block, -jnp.inf).max(0)
        least = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)) / 2**12, TINY)
        scale = as_stored(jnp.maximum((high - low) / (format.codes - 1), least))
        return scale, -low / scale

    return rule


@expression
def absmean():
    """The mean magnitude (BitNet b1.58, arXiv:2402.17764, eq. 3); symmetric only."""

    def rule(block, format, importance):
        if not format.symmetric:
            raise ValueError("absmean needs a symmetric format")
        return jnp.maximum(jnp.abs(block).mean(0), TINY), None

    return rule


@expression
def mse(smallest: float = 0.5, steps: int = 21, norm: float = 2.0):
    """The shrunk range with the least error sum |w - q(w)|^norm, by grid search.

    ``smallest`` is the smallest range tried, as a share of the full one. Errors are
    weighted by the importance of their input.
    """
    if not 0 < smallest <= 1 or steps < 1:
        raise ValueError(f"mse(smallest={smallest}, steps={steps}): 0 < smallest <= 1")

    def rule(block, format, importance):
        def error(shrink):
            back = _rounded(block, format, _range(block, format, shrink))
            return (jnp.abs(block - back) ** norm * per_entry(importance)).sum(0)

        shrinks = jnp.asarray(np.linspace(smallest, 1.0, steps), jnp.float32)
        best = shrinks[jax.lax.map(error, shrinks).argmin(0)]
        return _range(block, format, best)

    return rule


def _rounded(block, format: Format, params):
    """The block on the grid of (scale, zero) [out]."""
    scale, zero = params[0][None], params[1]
    zero = None if zero is None else zero[None]
    return format.decode(format.encode(block / scale, zero), zero) * scale


@expression
def best_table(rule=absmax()):
    """Of a choice of formats the one with the least squared error, block by block.

    ``rule`` scales each table; errors are weighted by the importance of their input.
    """

    def choose(block, format, importance):
        if not isinstance(format, Choice):
            raise ValueError(f"best_table needs a choice of tables; got {format}")
        found, losses = [], []
        for table in format.tables:
            params = rule(block, table, importance)
            error = block - _rounded(block, table, params)
            losses.append((error**2 * per_entry(importance)).sum(0))
            found.append(params[0])
        best = jnp.stack(losses).argmin(0)
        scale = jnp.take_along_axis(jnp.stack(found), best[None], 0)[0]
        return scale, best.astype(jnp.float32)

    return choose


@expression
def least_squares(rule=absmax(), steps: int = 10):
    """Another rule's scale refined: s = sum(w q) / sum(q^2) for the codes q, and again.

    Each step is the exact minimum over s of sum importance (w - s q)^2 for given q;
    the best of all steps is kept.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}; accepted: at least 1")

    def refined(block, format, importance):
        start, zero = rule(block, format, importance)
        weight = per_entry(importance)

        def step(state, _):
            scale, best, least = state
            v = _rounded(block, format, (scale, zero)) / scale[None]
            loss = (weight * (block - v * scale[None]) ** 2).sum(0)
            best = jnp.where(loss < least, scale, best)
            fitted = (weight * v * block).sum(0) / (weight * v * v).sum(0)
            scale = jnp.where(fitted > 0, fitted, scale)
            return (scale, best, jnp.minimum(loss, least)), None

        state = start, start, jnp.full_like(start, jnp.inf)
        return jax.lax.scan(step, state, length=steps + 1)[0][1], zero

    return refined


@expression
def power_of_two(rule=absmax()):
    """Another rule's scale rounded up to a power of two (microscaling formats)."""

    def rounded(block, format, importance):
        scale, zero = rule(block, format, importance)
        share, exponent = jnp.frexp(scale)  # of 1/2 <= share < 1
        return jnp.ldexp(1.0, jnp.where(share > 0.5, exponent, exponent - 1)), zero

    return rounded


@expression
def microscale():
    """2^(floor(log2 absmax) - e), e the exponent of the format's largest value.

    The shared exponent of the OCP Microscaling formats (version 1.0, section 6.3);
    values beyond the largest saturate.
    """

    def rule(block, format, importance):
        peak = jnp.maximum(jnp.abs(block).max(0), TINY)
        top = int(np.floor(np.log2(format.largest)))
        return jnp.ldexp(1.0, jnp.frexp(peak)[1] - 1 - top), None

    return rule


@expression
def half_quadratic(p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, steps=20):
    """HQQ: the zero point that minimises |w - q(w)|_p^p, p < 1, data-free.

    Half-quadratic splitting (Badri and Shaji 2023, eq. 3 to 6): with the scale fixed,
    alternate e = shrink(w - q(w), beta) and z = mean(codes - (w - e) / scale), with
    beta <- kappa beta. The zero point is real-valued.
    """
    if not 0 < p < 1 or steps < 0:
        raise ValueError(f"p {p}, steps {steps}; accepted: 0 < p < 1, steps >= 0")

    def rule(block, format, importance):
        if format.symmetric:
            raise ValueError(
                "half_quadratic fits a zero point: use an asymmetric format"
            )
        scale, zero = (p[None] for p in _range(block, format))

        def shrink(error, weight):
            small = (
                jnp.abs(error) - jnp.maximum(jnp.abs(error), TINY) ** (p - 1) / weight
            )
            return jnp.sign(error) * jnp.maximum(small, 0.0)

        def step(i, state):
            zero, best, least = state
            codes = format.encode(block / scale, zero).astype(jnp.float32)
            error = block - (codes - zero) * scale
            loss = jnp.abs(error).mean(0, keepdims=True)
            best = jnp.where(loss < least, zero, best)
            outlier = shrink(error, beta * kappa**i)
            zero = (codes - (block - outlier) / scale).mean(0, keepdims=True)
            return zero, best, jnp.minimum(loss, least)

        start = zero, zero, jnp.full_like(zero, jnp.inf)
        best = jax.lax.fori_loop(0, steps + 1, step, start)[1]
        return scale[0], best[0]

    return rule


@dataclasses.dataclass(frozen=True)
class Grid:
    """Number format x block x scale rule: a set that weights are projected on.

    ``block`` inputs share a scale (None: all of an output). Scales are stored as
    ``scale_dtype``; ``scale_format`` rounds them again in blocks of ``scale_block``
    (double quantization; None: all together): neighbouring groups of an output, or
    with ``scale_across`` neighbouring outputs of a group. Zero points are stored as
    uint8, as bfloat16 with ``real_zero``, or rounded like the scales to
    ``zero_format``.
    """

    format: Format
    block: int | None = None
    rule: Any = absmax()
    real_zero: bool = False
    scale_format: Format | None = None
    scale_block: int | None = 256
    scale_across: bool = False
    scale_dtype: str = "bfloat16"
    zero_format: Format | None = None

    filling = 0.0  # importance of inputs that only fill a short last block

    def __post_init__(self):
        if self.block is not None and self.block < 1:
            raise ValueError(f"group size {self.block}; accepted: None or at least 1")

    def fit(self, block: Float[Array, "n out"], importance, support=None):
        """Parameters of one block, as they will be stored: (scale, zero) [out]."""
        scale, zero = self.rule(block, self.format, importance)
        if zero is not None:
            zero = _stored(zero, self._zero_dtype)
        return _stored(scale, self.scale_dtype), zero

    @property
    def two_level(self) -> bool:
        """Whether the parameters of all blocks are rounded together."""
        return self.scale_format is not None or self.zero_format is not None

    def settle(self, params):
        """The parameters of all blocks [groups, out] as they will be stored."""
        scale, zero = params
        if self.scale_format is not None:
            scale = self._again(scale, self.scale_format)
        if self.zero_format is not None:
            zero = self._again(zero, self.zero_format)
        return scale, zero

    def _again(self, values, format: Format):
        line = self._double(values.T, format).materialize()
        return line.reshape(values.shape[::-1]).T

    @property
    def _zero_dtype(self):
        real = self.real_zero or self.zero_format is not None
        return jnp.bfloat16 if real else jnp.uint8

    def snap(self, values: Float[Array, "... out"], params):
        """The nearest grid points to values whose parameters are [..., out]."""
        scale, zero = params
        return (
            self.format.decode(self.format.encode(values / scale, zero), zero) * scale
        )

    def pack(self, values: Float[Array, "in out"], params, support, dtype) -> Quantized:
        """The stored weight; ``params`` are [groups, out]."""
        scale, zero = params
        stored = scale.T.astype(self.scale_dtype)
        if self.scale_format is not None:
            stored = self._double(scale.T, self.scale_format)
        if zero is not None:
            zero = zero.T.astype(self._zero_dtype)
            if self.zero_format is not None:
                zero = self._double(zero, self.zero_format)
        return Quantized.encode(values.T, stored, zero, self.format, self.block, dtype)

    def _double(self, scale, format: Format) -> Quantized:
        """Scales [out, groups] as codes with scales of their own, one line or many."""
        shape = scale.shape if self.scale_across else (-1, 1)
        line = scale.reshape(shape).astype(jnp.float32)
        rule = absmax() if format.symmetric else span()
        real = not format.symmetric
        inner = Grid(format, self.scale_block, rule, real_zero=real)
        params = fit_all(inner, line, jnp.ones(len(line)), None)
        return inner.pack(line, params, None, "float32")


def _stored(value, dtype):
    return value.astype(dtype).astype(jnp.float32)


def fit_all(
    target, w: Float[Array, "in out"], importance, support: Bool[Array, "in out"] | None
):
    """Parameters of all blocks of a weight, stacked [groups, ...].

    A short last block is filled with zeros, of the importance ``target.filling``.
    """
    blocks = in_blocks(target, w)
    weights = in_blocks(target, importance, target.filling)
    if support is None:
        found = jax.vmap(lambda b, i: target.fit(b, i, None))(blocks, weights)
    else:
        found = jax.vmap(target.fit)(blocks, weights, in_blocks(target, support))
    return target.settle(found) if getattr(target, "two_level", False) else found


def projected(grid: Grid, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The weight that rounding to the nearest stores, without storing it."""
    params = fit_all(grid, w, jnp.ones(len(w)), None)
    each = jax.tree.map(lambda p: p[:, None], params)
    blocks = grid.snap(in_blocks(grid, w), each)
    return blocks.reshape(-1, w.shape[1])[: len(w)]


def in_blocks(target, x, filling=0.0):
    """[blocks, block, ...] of an array [in, ...]; ``filling`` ends the last one."""
    count = len(x)
    block = min(target.block or count, count)
    sides = ((0, -count % block), *[(0, 0)] * (x.ndim - 1))
    filled = jnp.pad(x, sides, constant_values=filling)
    return filled.reshape(-1, block, *x.shape[1:])


def group_peaks(target, w: Float[Array, "in out"]) -> Float[Array, "groups out"]:
    """The largest value of each block of inputs, with its gradient."""
    return peak(in_blocks(target, w, -jnp.inf), 1)[:, 0]


def group_of(target, count: int) -> Array:
    """The block that each of ``count`` inputs belongs to."""
    return jnp.arange(count) // min(target.block or count, count)
