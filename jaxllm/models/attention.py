"""Attention: one function of queries, keys, values and a mask, and its module."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from jaxllm.core.formats import Log2
from jaxllm.core.hadamard import hadamard_transform
from jaxllm.models.config import Attention as AttentionConfig
from jaxllm.models.layers import Linear, Norm, Part, Pass, observe, rotate
from pallas_kernels.decode_attention import op as decode_attention
from pallas_kernels.flash_attention import op as flash_attention

NEGATIVE = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    q: Float[Array, "batch q heads dim"],
    k: Float[Array, "batch kv kv_heads dim"],
    v: Float[Array, "batch kv kv_heads dim"],
    mask: Bool[Array, "batch q kv"],
    *,
    scale: float,
    softcap: float | None = None,
    format: Log2 | None = None,
) -> Float[Array, "batch q heads dim"]:
    """softmax(scale q kT + mask) v, grouped queries sharing each key head.

    Scores and softmax are float32, probabilities are rounded to ``format``; a row
    with nothing visible gives zeros.
    """
    groups = rearrange(q, "b q (k g) d -> b k g q d", k=k.shape[2])
    scores = jnp.einsum(
        "bkgqd,btkd->bkgqt", groups, k, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = mask[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), -1)
    probabilities = jnp.where(visible, probabilities, 0.0)
    if format is not None:
        probabilities = format.round(probabilities)
    probabilities = probabilities.astype(v.dtype)
    mixed = jnp.einsum("bkgqt,btkd->bqkgd", probabilities, v)
    return rearrange(mixed, "b q k g d -> b q (k g) d")


def visibility(values: Pass, window: int | None) -> Bool[Array, "batch q kv"]:
    """Who sees whom: causal, within the window, within the document.

    Positions grow within a document. With a cache, slots do, and what lies beyond a
    query's slot has not been written yet.
    """
    if values.cache is not None:
        mine = values.cache.slots(values.positions, values.tokens)[:, :, None]
        theirs = jnp.arange(values.cache.length)[None, None, :]
    else:
        mine = values.positions[:, :, None]
        theirs = values.positions[:, None, :]
    mask = theirs <= mine
    if window is not None:
        mask &= mine - theirs < window
    if values.segments is not None and values.cache is None:
        mask &= values.segments[:, :, None] == values.segments[:, None, :]
    return mask


class Attention(Part):
    """Grouped-query attention with optional rotary embedding, bias and QK norm.

    Returns the output, the layer's cache, and what a rule chose of the tokens.
    """

    config: AttentionConfig

    @nn.compact
    def __call__(self, x, values: Pass):
        c, d = self.config, self.config.head_dim
        observe(self, "input", x, values)
        project = lambda name, heads: Linear(  # noqa: E731
            (self.width, heads * d), c.bias, self.std, self.dtype, name=name
        )(x)
        q = rearrange(project("q", c.heads), "b s (h d) -> b s h d", d=d)
        k = rearrange(project("k", c.kv_heads), "b s (h d) -> b s h d", d=d)
        v = rearrange(project("v", c.kv_heads), "b s (h d) -> b s h d", d=d)
        if c.qk_norm is not None:
            q = Norm(c.qk_norm, d, self.dtype, name="q_norm")(q)
            k = Norm(c.qk_norm, d, self.dtype, name="k_norm")(k)
        if c.rope is not None:
            at = values.positions, c.rope, values.segments
            q, k = (rotate(t, *at) for t in (q, k))
        if c.rotate_qk:
            q, k = hadamard_transform(q), hadamard_transform(k)
        mixed, cache = self._mix(q, k, v, values)
        mixed = rearrange(mixed, "b s h d -> b s (h d)")
        observe(self, "mixed", mixed, values)
        chosen = None
        if values.rule is not None:
            mix = functools.partial(self._mixed_values, q, k, values.segments)
            chosen = values.rule.choose(mix, values.segments, values.tokens.low)
            mixed = values.rule.lowered(mixed, chosen.low)
        shape = (c.heads * d, self.width)
        out = Linear(shape, c.out_bias, self.out_std, self.dtype, name="o")(mixed)
        return out, cache, chosen

    def _mixed_values(self, q, k, segments, numbers):
        """sum_t p[i, t] numbers[t] within the pass, the mean over heads."""
        wide = numbers[:, :, None, None].astype(q.dtype)
        v = jnp.pad(wide, [(0, 0)] * 3 + [(0, k.shape[-1] - 1)])
        v = jnp.broadcast_to(v, k.shape)
        return self._flash(q, k, v, segments)[..., 0].astype(jnp.float32).mean(2)

    def _flash(self, q, k, v, segments):
        pair = None if segments is None else (segments, segments)
        return flash_attention(q, k, v, pair, **self._options())

    def _options(self) -> dict:
        """What all kernels are told of the scores."""
        c = self.config
        return dict(scale=c.scale, soft_cap=c.softcap, window=c.window)

    def _mix(self, q, k, v, values: Pass):
        """What each query gathers, and the updated cache.

        A whole pass and a single step have kernels; a prompt that is written into a
        cache, a cache that the kernel cannot read, an attention function of the
        caller's, and rounded probabilities take the dense mask.
        """
        c, step, custom = self.config, q.shape[1] == 1, values.attend
        if c.probabilities is not None:  # no kernel has a row's sum before its end
            custom = functools.partial(custom or attend, format=c.probabilities)
        if values.cache is not None:
            slots = values.cache.slots(values.positions, values.tokens)
            cache = values.cache.write(k, v, slots, values.segments)
            if step and custom is None and cache.direct:
                stored, lengths = cache.stored, slots[:, 0] + 1
                mixed = decode_attention(q[:, 0], *stored, lengths, **self._options())
                return mixed[:, None], cache
            cache = cache.without(values.tokens)
            k, v = cache.read(k.dtype)
        else:
            cache = None
            if c.kv is not None:
                k, v = c.kv.round(k), c.kv.round(v)
            if custom is None:
                return self._flash(q, k, v, values.segments), cache
        scale = c.head_dim**-0.5 if c.scale is None else c.scale
        mask = visibility(values, c.window)
        run = custom or attend
        return run(q, k, v, mask, scale=scale, softcap=c.softcap), cache
