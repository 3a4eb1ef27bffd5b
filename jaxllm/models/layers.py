"""Linear maps, norms, rotary embedding and activations, as Flax Linen modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.arrays import to_rank
from jaxllm.core.stats import Stats
from jaxllm.core.streams import spans
from jaxllm.models.config import Norm as NormConfig
from jaxllm.models.config import Rope, RopeScaling


@dataclasses.dataclass(frozen=True)
class Pass:
    """What varies between forward passes, handed to every module as a value.

    ``positions``, ``segments``: int32 [batch, length] or None; ``cache``: the
    layer's cache or None; ``collect``: names of statistics to sow; ``weights``: the
    share of each token in them, [batch, length]; ``attend``: the attention function;
    ``tokens``: the ``Stream`` where layers may drop some; ``rule``: the layer's rule.
    """

    positions: Any
    segments: Any = None
    cache: Any = None
    collect: tuple[str, ...] = ()
    weights: Any = None
    attend: Callable | None = None
    tokens: Any = None
    rule: Any = None

    def after(self, chosen, hidden):
        """(hidden states, values) of the tokens that a rule's choice leaves."""
        if chosen is None:
            return hidden, self
        hidden, stream = self.tokens.follow(chosen, hidden)
        return hidden, dataclasses.replace(self, tokens=stream)

    def lowered(self, x):
        """``x`` with the tokens of least score rounded, where the layer has a rule."""
        return x if self.rule is None else self.rule.lowered(x, self.tokens.low)


def read(module: nn.Module, name: str, init: Callable, shape: tuple, dtype):
    """A parameter as it is (a packed weight has another shape), else a fresh one."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, dtype)


def observe(module: nn.Module, name: str, x, values: Pass) -> None:
    """Sow the statistics of a linear input, once for all weights that share it."""
    if values.collect:
        found = Stats.of(values.collect, x, values.weights)
        add = lambda a, b: b if a is None else a + b  # noqa: E731
        module.sow("stats", name, found, reduce_fn=add, init_fn=lambda: None)


class Part(nn.Module):
    """A part of a block: its own configuration and what all parts share.

    ``width`` is that of the residual stream; matrices start normal with ``std``, those
    that write to the stream with ``out_std``.
    """

    config: Any
    width: int
    std: float = 0.02
    out_std: float = 0.02
    dtype: Any = jnp.float32

    def part(self, kind: type[Part], config, name: str) -> Part:
        """A part inside this one."""
        return kind(config, self.width, self.std, self.out_std, self.dtype, name=name)


class Linear(nn.Module):
    """y = x W + b with W of logical shape [in, out]: an array or a weight type."""

    shape: tuple[int, int]
    bias: bool = False
    std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(self.std)
        y = weights.dot(x, read(self, "weight", normal, self.shape, self.dtype))
        if self.bias or self.has_variable("params", "bias"):
            zeros = nn.initializers.zeros
            b = read(self, "bias", zeros, self.shape[1:], self.dtype)
            y = y + to_rank(b, y.ndim).astype(y.dtype)
        return y


class Norm(nn.Module):
    """RMS or layer norm over the last axis, computed in float32."""

    config: NormConfig
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        plus_one, layer = self.config.plus_one, self.config.kind == "layer"
        start = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = read(self, "scale", start, (self.width,), self.dtype)
        y = x.astype(jnp.float32)
        if layer:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.config.eps)
        y = y * to_rank(scale.astype(jnp.float32) + float(plus_one), y.ndim)
        if layer or self.has_variable("params", "bias"):
            zeros = nn.initializers.zeros
            bias = read(self, "bias", zeros, (self.width,), self.dtype)
            y = y + to_rank(bias, y.ndim).astype(jnp.float32)
        return y.astype(x.dtype)


def activation(name: str) -> Callable:
    """The pointwise function of a feed-forward layer."""
    return {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(x * jnp.asarray(1.702, x.dtype)),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    }[name]


def rotate(x, positions, rope: Rope, segments=None):
    """Rotary embedding of ``x`` [batch, length, heads, dim] at ``positions``."""
    dim = int(x.shape[-1] * rope.fraction)
    frequencies, gain = rotary_frequencies(rope, dim, positions, segments)
    angle = positions[..., None].astype(jnp.float32) * to_rank(frequencies, 3)
    cos, sin = (f(angle)[:, :, None, :] * gain for f in (jnp.cos, jnp.sin))
    part, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    if rope.interleaved:
        a, b = part[..., ::2], part[..., 1::2]
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = jnp.stack(pair, -1).reshape(part.shape)
    else:
        a, b = jnp.split(part, 2, -1)
        turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
    return jnp.concatenate((turned.astype(x.dtype), rest), -1)


def rotary_frequencies(rope: Rope, dim: int, positions, segments=None):
    """Angular frequencies [dim / 2] and the gain on cosine and sine.

    Those of longrope, [batch, length or 1, dim / 2], depend on the length so far of
    each token's document; transformers takes the longest of the batch.
    """
    base = 1.0 / rope.theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    s = rope.scaling
    if s is None:
        return base, 1.0
    if s.kind == "linear":
        return base / s.factor, 1.0
    if s.kind == "llama3":
        return _llama3(base, s), 1.0
    if s.kind == "yarn":
        return _yarn(base, rope, dim), s.attention_factor
    if s.kind == "longrope":
        short, long = (
            jnp.asarray(x, jnp.float32)[None, None] for x in (s.short, s.long)
        )
        beyond = _last(positions, segments)[..., None] >= s.original_length
        factors = jnp.where(beyond, long, short)
        return to_rank(base, 3) / factors, s.attention_factor
    kinds = "linear, llama3, yarn, longrope"
    raise ValueError(f"rope scaling {s.kind!r}; accepted: {kinds}")


def _last(positions, segments):
    """The last position of each token's document [batch, length or 1]."""
    if segments is None:
        return positions.max(1, keepdims=True)
    _, end = spans(positions.shape, segments)
    return jnp.take_along_axis(positions, end - 1, 1)


def _llama3(base, s: RopeScaling):
    """Long wavelengths are stretched, short ones kept, a ramp between (Llama 3.1)."""
    turns = s.original_length * base / (2 * math.pi)
    width = s.high_freq_factor - s.low_freq_factor
    keep = jnp.clip((turns - s.low_freq_factor) / width, 0.0, 1.0)
    return base * (keep + (1 - keep) / s.factor)


def _yarn(base, rope: Rope, dim: int):
    """YaRN (arXiv:2309.00071): a linear ramp between the two turn counts."""
    s = rope.scaling
    log_theta = math.log(rope.theta)

    def index(turns: float) -> float:
        return dim * math.log(s.original_length / (turns * 2 * math.pi)) / 2 / log_theta

    low = max(math.floor(index(s.beta_fast)), 0)
    high = min(math.ceil(index(s.beta_slow)), dim - 1)
    ramp = (jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
    keep = 1.0 - jnp.clip(ramp, 0.0, 1.0)
    return base * (keep + (1 - keep) / s.factor)
