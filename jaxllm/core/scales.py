"""Scale rules: from the weights of one block to its scale and zero point.

A rule is called as ``rule(block, format, importance) -> (scale, zero)`` with a block
[inputs, out] in float32 and the importance [inputs] of each input (mean square, one
where nothing is known); it returns [out] each, ``zero`` None for symmetric formats.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.core.formats import TINY, Format
from jaxllm.core.spec import expression
from jaxllm.core.weights import Quantized


def _range(block, format: Format, shrink=1.0):
    """Scale and zero point that cover the block, shrunk toward zero."""
    if format.symmetric:
        peak = jnp.abs(block).max(0)
        return jnp.maximum(peak * shrink / format.largest, TINY), None
    low = jnp.minimum(block.min(0), 0) * shrink
    high = jnp.maximum(block.max(0), 0) * shrink
    scale = jnp.maximum((high - low) / (format.codes - 1), TINY)
    return scale, jnp.clip(jnp.round(-low / scale), 0, format.codes - 1)


@expression
def absmax():
    """The range of the block: absmax (symmetric) or min and max (asymmetric)."""
    return lambda block, format, importance: _range(block, format)


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
            scale, zero = _range(block, format, shrink)
            zero = None if zero is None else zero[None]
            codes = format.encode(block / scale[None], zero)
            back = format.decode(codes, zero) * scale[None]
            loss = jnp.abs(block - back) ** norm * importance[:, None]
            return loss.sum(0)

        shrinks = jnp.asarray(np.linspace(smallest, 1.0, steps), jnp.float32)
        best = shrinks[jax.lax.map(error, shrinks).argmin(0)]
        return _range(block, format, best)

    return rule


@expression
def power_of_two(rule=absmax()):
    """Another rule's scale rounded up to a power of two (microscaling formats)."""

    def rounded(block, format, importance):
        scale, zero = rule(block, format, importance)
        return 2.0 ** jnp.ceil(jnp.log2(scale)), zero

    return rounded


@expression
def half_quadratic(p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, steps=20):
    """HQQ: the zero point that minimises |w - q(w)|_p^p, p < 1, data-free.

    Half-quadratic splitting (Badri and Shaji 2023, eq. 3 to 6): with the scale fixed,
    alternate e = shrink(w - q(w), beta) and z = mean(codes - (w - e) / scale), with
    beta <- kappa beta. The zero point is real-valued.
    """

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
    bfloat16; ``scale_format`` rounds them again in blocks of ``scale_block`` (double
    quantization). Zero points are stored as uint8, or as bfloat16 with ``real_zero``.
    """

    format: Format
    block: int | None = None
    rule: Any = absmax()
    real_zero: bool = False
    scale_format: Format | None = None
    scale_block: int = 256

    filling = 0.0  # importance of inputs that only fill a short last block

    def __post_init__(self):
        if self.block is not None and self.block < 1:
            raise ValueError(f"group size {self.block}; accepted: None or at least 1")

    def fit(self, block: Float[Array, "n out"], importance, support=None):
        """Parameters of one block, as they will be stored: (scale, zero) [out]."""
        scale, zero = self.rule(block, self.format, importance)
        if zero is not None:
            zero = _stored(zero, self._zero_dtype)
        return _stored(scale, jnp.bfloat16), zero

    @property
    def _zero_dtype(self):
        return jnp.bfloat16 if self.real_zero else jnp.uint8

    def snap(self, values: Float[Array, "... out"], params):
        """The nearest grid points to values whose parameters are [..., out]."""
        scale, zero = params
        return (
            self.format.decode(self.format.encode(values / scale, zero), zero) * scale
        )

    def pack(self, values: Float[Array, "in out"], params, support, dtype) -> Quantized:
        """The stored weight; ``params`` are [groups, out]."""
        scale, zero = params
        zero = None if zero is None else zero.T.astype(self._zero_dtype)
        if self.scale_format is None:
            stored = scale.T.astype(jnp.bfloat16)
        else:
            stored = self._double(scale.T, self.scale_format)
        return Quantized.encode(values.T, stored, zero, self.format, self.block, dtype)

    def _double(self, scale, format: Format) -> Quantized:
        """Scales [out, groups] as one line of codes with scales of their own."""
        line = scale.reshape(-1, 1)
        inner = Grid(format, self.scale_block)
        params = fit_all(inner, line, jnp.ones(len(line)), None)
        return inner.pack(line, params, None, "float32")


def _stored(value, dtype):
    return value.astype(dtype).astype(jnp.float32)


def fit_all(
    target, w: Float[Array, "in out"], importance, support: Bool[Array, "..."] | None
):
    """Parameters of all blocks of a weight, stacked [groups, ...].

    A short last block is filled with zeros, of the importance ``target.filling``.
    """
    count, out = w.shape
    block = min(target.block or count, count)
    short = -count % block
    pad = lambda x: jnp.pad(x, ((0, short), (0, 0)))  # noqa: E731
    blocks = pad(w).reshape(-1, block, out)
    weights = jnp.pad(importance, (0, short), constant_values=target.filling)
    weights = weights.reshape(-1, block)
    if support is None:
        return jax.vmap(lambda b, i: target.fit(b, i, None))(blocks, weights)
    return jax.vmap(target.fit)(blocks, weights, pad(support).reshape(-1, block, out))


def group_of(target, count: int) -> Array:
    """The block that each of ``count`` inputs belongs to."""
    return jnp.arange(count) // min(target.block or count, count)
