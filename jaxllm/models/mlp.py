"""Feed-forward layers: two-matrix, gated, and mixtures of gated experts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.stats import Stats
from jaxllm.models.config import MLP as MLPConfig
from jaxllm.models.config import MoE as MoEConfig
from jaxllm.models.layers import Linear, Part, Pass, activation, observe, read


class MLP(Part):
    """down(act(gate x) * up x), or down(act(up x)) when it is not gated."""

    config: MLPConfig

    @nn.compact
    def __call__(self, x, values: Pass):
        c = self.config
        wide, act = (self.width, c.hidden), activation(c.activation)
        observe(self, "input", x, values)
        linear = lambda name: Linear(wide, c.bias, self.std, self.dtype, name=name)(x)  # noqa: E731
        hidden = act(linear("gate")) * linear("up") if c.gated else act(linear("up"))
        observe(self, "hidden", hidden, values)
        down = Linear(wide[::-1], c.bias, self.out_std, self.dtype, name="down")
        return down(values.lowered(hidden))


class Experts(Part):
    """The stacked weights [experts, in, out] of the routed part."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x, group_sizes, owner, values: Pass):
        """``x`` [tokens, width] sorted by expert; ``owner`` [tokens], its weight."""
        c = self.config
        wide = (c.experts, self.width, c.hidden)
        narrow = (c.experts, c.hidden, self.width)
        gate = _Stack(wide, self.std, self.dtype, name="gate")()
        up = _Stack(wide, self.std, self.dtype, name="up")()
        down = _Stack(narrow, self.out_std, self.dtype, name="down")()
        dot = lambda a, w: weights.dot(a, w, group_sizes=group_sizes)  # noqa: E731
        self._observe("input", x, owner, values)
        hidden = activation(c.activation)(dot(x, gate)) * dot(x, up)
        self._observe("hidden", hidden, owner, values)
        return dot(hidden, down)

    def _observe(self, name: str, x, owner, values: Pass) -> None:
        """Statistics per expert, with its own share of tokens: leading axis experts."""
        if values.collect:
            index, share = owner
            own = index[None] == jnp.arange(self.config.experts)[:, None]
            mine = jnp.where(own, share[None], 0.0)
            of = lambda w: Stats.of(values.collect, x, w)  # noqa: E731
            add = lambda a, b: b if a is None else a + b  # noqa: E731
            found = jax.vmap(of)(mine)
            self.sow("stats", name, found, reduce_fn=add, init_fn=lambda: None)


class _Stack(nn.Module):
    """A parameter [experts, in, out] under the name "weight"."""

    shape: tuple[int, ...]
    std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self):
        normal = nn.initializers.normal(self.std)
        return read(self, "weight", normal, self.shape, self.dtype)


class MoE(Part):
    """Sum of the top-k experts' outputs, weighted by their softmax probabilities."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x, values: Pass):
        c = self.config
        flat = x.reshape(-1, self.width)
        shape = self.width, c.experts
        router = Linear(shape, False, self.std, self.dtype, name="router")
        probabilities = jax.nn.softmax(router(flat).astype(jnp.float32), -1)
        share, index = jax.lax.top_k(probabilities, c.top_k)
        if c.normalize:
            share = share / share.sum(-1, keepdims=True)
        routed = self._route(flat, share.astype(x.dtype), index, values)
        if c.shared is not None:
            routed = routed + self._shared(x, values).reshape(flat.shape)
        return routed.reshape(x.shape)

    def _route(self, flat, share, index, values: Pass):
        c = self.config
        order = jnp.argsort(index.reshape(-1), stable=True)
        token = order // c.top_k
        sizes = jnp.bincount(index.reshape(-1), length=c.experts).astype(jnp.int32)
        ones = jnp.ones(len(flat)) if values.weights is None else values.weights
        owner = index.reshape(-1)[order], ones.reshape(-1)[token]
        experts = self.part(Experts, c, "experts")
        out = experts(flat[token], sizes, owner, values)
        out = out * share.reshape(-1)[order][:, None]
        return jnp.zeros_like(flat).at[token].add(out)

    def _shared(self, x, values: Pass):
        c, one = self.config, (self.width, 1)
        y = self.part(MLP, c.shared, "shared")(x, values)
        if c.shared_gate:
            gate = Linear(one, False, self.std, self.dtype, name="shared_gate")
            y = y * jax.nn.sigmoid(gate(x))
        return y
