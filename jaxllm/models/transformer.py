"""The decoder-only transformer: embedding, blocks, head, and its sites as data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import weights
from jaxllm.core.arrays import to_rank
from jaxllm.core.model import Model, Params, Residual, Site, Units
from jaxllm.core.streams import Stream, TokenRule
from jaxllm.models.attention import Attention
from jaxllm.models.blocks import scanned, unrolled
from jaxllm.models.cache import LayerCache
from jaxllm.models.config import MLP as MLPConfig
from jaxllm.models.config import Layer, Norm, Policy
from jaxllm.models.layers import Norm as NormModule
from jaxllm.models.layers import Part, Pass
from jaxllm.models.mlp import MLP
from jaxllm.models.mlp import MoE as MoEModule
from jaxllm.models.resize import with_layers, with_units, with_width
from jaxllm.models.sites import find_residual, find_sites, find_units


class Block(Part):
    """One layer: (hidden, values) -> (hidden, layer cache, stream of tokens)."""

    config: Layer

    @nn.compact
    def __call__(self, x, values: Pass):
        if values.tokens is not None:
            values = dataclasses.replace(values, rule=self.config.tokens)
        attended, cache, chosen = self._attend(x, values)
        if self.config.parallel:  # tokens leave when both parts have read them
            _, here = values.after(chosen and chosen.marks, x)
            x, values = values.after(chosen, x + attended + self._feed(x, here))
            return x, cache, values.tokens
        x, values = values.after(chosen, x + attended)
        return x + self._feed(x, values), cache, values.tokens

    def _norm(self, name: str, x):
        return NormModule(self.config.norm, self.width, self.dtype, name=name)(x)

    def _attend(self, x, values: Pass):
        c = self.config
        if c.attention is None:
            return jnp.zeros_like(x), None, None
        attention = self.part(Attention, c.attention, "attn")
        y, cache, chosen = attention(self._norm("attn_norm", x), values)
        y = self._norm("attn_post_norm", y) if c.post_norm else y
        return y, cache, chosen

    def _feed(self, x, values: Pass):
        c = self.config
        if c.ffn is None:
            return jnp.zeros_like(x)
        dense = isinstance(c.ffn, MLPConfig)
        kind, name = (MLP, "mlp") if dense else (MoEModule, "moe")
        x = values.lowered(self._norm("mlp_norm", x))
        y = self.part(kind, c.ffn, name)(x, values)
        return self._norm("mlp_post_norm", y) if c.post_norm else y


@dataclasses.dataclass(frozen=True)
class BlockDefinition:
    """What a block needs besides parameters; equal definitions share compilations."""

    config: Layer
    width: int
    std: float
    out_std: float
    param_dtype: str

    def module(self) -> Block:
        dtype = jnp.dtype(self.param_dtype)
        return Block(self.config, self.width, self.std, self.out_std, dtype)

    def apply(self, params: Params, hidden, values: Pass):
        """((hidden, layer cache, stream of tokens), statistics by tap) of one block."""
        made, sown = self.module().apply(
            {"params": params}, hidden, values, mutable=["stats"]
        )
        return made, sown.get("stats", {})

    def run(self, params, hidden, positions, segments, weights, collect=()):
        """(hidden, statistics) of all tokens, without a cache: what the walk calls."""
        values = Pass(positions, segments, collect=collect, weights=weights)
        (hidden, _, _), stats = self.apply(params, hidden, values)
        return hidden, stats


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Configuration and forward pass of a model; hashable, no parameters inside.

    ``positions`` is the size of a learned position table (0: none), whose row
    ``position_offset`` is position 0. ``embed_scale`` multiplies embeddings.
    ``family`` names the exchange layout that import and export use.
    """

    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    norm: Norm | None = Norm()
    tied: bool = False
    embed_scale: float | None = None
    positions: int = 0
    position_offset: int = 0
    logit_softcap: float | None = None
    max_length: int = 2048
    init_std: float = 0.02
    policy: Policy = Policy()
    family: str = "llama"

    def __post_init__(self):
        if not self.layers:
            raise ValueError("a transformer needs at least one layer")

    def blocks(self) -> tuple[tuple[str, BlockDefinition], ...]:
        out_std = self.init_std / math.sqrt(2 * len(self.layers))
        size = self.width, self.init_std, out_std, self.policy.param
        return tuple(
            (f"layers.{i}", BlockDefinition(layer, *size))
            for i, layer in enumerate(self.layers)
        )

    def embed(self, params: Params, tokens, positions=None):
        """Hidden states [batch, length, width] of int32 tokens [batch, length]."""
        dtype = jnp.dtype(self.policy.compute)
        hidden = weights.rows(params["embed"]["weight"], tokens).astype(dtype)
        if self.embed_scale is not None:
            hidden = hidden * jnp.asarray(self.embed_scale, dtype)
        if self.positions:
            self._check_length(tokens)
            table = params["positions"]["table"].astype(dtype)
            hidden = hidden + table[positions + self.position_offset]
        return hidden

    def _check_length(self, tokens) -> None:
        if tokens.shape[-1] > self.positions:
            raise ValueError(
                f"{tokens.shape[-1]} tokens, but the model has learned "
                f"{self.positions} positions"
            )

    @property
    def head_path(self) -> str:
        """Where the head's weight is: a tied one is the embedding."""
        return "embed" if self.tied else "head"

    def final(self, params: Params, hidden):
        """What the head reads: the last hidden states after the final norm."""
        if self.norm is None:
            return hidden
        module = NormModule(self.norm, self.width)
        return module.apply({"params": params["norm"]}, hidden)

    def head(self, params: Params, hidden):
        """Float32 logits [batch, length, vocabulary] of the last hidden states."""
        head = params[self.head_path]
        logits = weights.dot(self.final(params, hidden), head["weight"])
        logits = logits.astype(jnp.float32)
        if "bias" in head:
            bias = to_rank(head["bias"], logits.ndim)
            logits = logits + bias.astype(jnp.float32)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * jnp.tanh(logits / self.logit_softcap)
        return logits

    def forward(
        self,
        params: Params,
        tokens,
        *,
        positions=None,
        segments=None,
        cache=None,
        scan: bool = False,
        stepwise: bool = False,
        remat: bool = False,
        attend=None,
        hidden_only: bool = False,
    ):
        """Logits (and the cache when one is given); see ``Model.__call__``.

        ``scan`` stacks runs of equal layers and compiles each run once; ``stepwise``,
        for calls outside jit, makes each block a program of its own, one for all that
        are equal, and copies nothing; ``remat`` recomputes a block's activations in
        the backward pass; ``hidden_only`` stops before the head.
        """
        positions = default_positions(tokens, positions)
        hidden = self.embed(params, tokens, positions)
        values = Pass(positions, segments, attend=attend)
        if tokens.shape[1] > 1 and any(layer.tokens for layer in self.layers):
            stream = Stream.start(hidden, positions, segments)
            values = dataclasses.replace(values, tokens=stream)
        how = scanned if scan else functools.partial(unrolled, stepwise=stepwise)
        hidden, cache = how(self, params, hidden, values, cache, remat)
        out = hidden if hidden_only else self.head(params, hidden)
        return out if cache is None else (out, cache)

    def empty_cache(self, batch: int, length: int, dtype=None) -> dict[str, LayerCache]:
        """A cache with room for ``length`` positions, by layer path."""
        dtype = jnp.dtype(dtype or self.policy.compute)
        drops = any(layer.tokens and layer.tokens.drop for layer in self.layers)
        empty = functools.partial(LayerCache.empty, batch, length, drops=drops)
        return {
            path: empty(block.config.attention, dtype)
            for path, block in self.blocks()
            if block.config.attention is not None
        }

    @property
    def rereads(self) -> tuple[int, ...]:
        """Lengths beyond which a text must be read anew: longrope changes its factors.

        A cache that was filled up to there holds keys of the old ones. ``generate``
        fills a fresh one; callers who decode by themselves must do so too.
        """
        ropes = (x.attention.rope for x in self.layers if x.attention is not None)
        scalings = (rope.scaling for rope in ropes if rope is not None)
        found = {s.original_length for s in scalings if s and s.kind == "longrope"}
        return tuple(sorted(found))

    def untied(self) -> Transformer:
        """The same architecture with a head of its own."""
        return dataclasses.replace(self, tied=False)

    def with_cache(self, format, rotate_qk: bool = False) -> Transformer:
        """Keys and values in a number format (None: as computed), in every layer."""
        return self._with_attention(kv=format, rotate_qk=rotate_qk)

    def with_probabilities(self, format) -> Transformer:
        """The softmax of every layer rounded to ``format`` (None: as computed)."""
        return self._with_attention(probabilities=format)

    def _with_attention(self, **fields) -> Transformer:
        def changed(layer: Layer) -> Layer:
            if layer.attention is None:
                return layer
            attention = dataclasses.replace(layer.attention, **fields)
            return dataclasses.replace(layer, attention=attention)

        return dataclasses.replace(self, layers=tuple(map(changed, self.layers)))

    def with_tokens(self, rules: dict[str, TokenRule]) -> Transformer:
        """Layers with rules for their tokens, by path; other layers have none.

        A pass with such layers drops and rounds tokens; the walk sees all of them.
        Layers without attention, by which tokens are chosen, are left alone.
        """

        def changed(i: int, layer: Layer) -> Layer:
            rule = rules.get(f"layers.{i}") if layer.attention else None
            return dataclasses.replace(layer, tokens=rule)

        layers = itertools.starmap(changed, enumerate(self.layers))
        return dataclasses.replace(self, layers=tuple(layers))

    def linears(self) -> tuple[str, ...]:
        """Paths of the weights that methods compress unless told otherwise."""
        found = (p for s in self.sites() for p in s.consumers)
        return tuple(p for p in found if p != self.head_path)

    def sites(self) -> tuple[Site, ...]:
        return find_sites(self)

    def residual(self) -> Residual:
        return find_residual(self)

    def units(self) -> tuple[Units, ...]:
        return find_units(self)

    def with_units(self, counts: dict[str, int]) -> Transformer:
        return with_units(self, counts)

    def with_width(self, width: int) -> Transformer:
        return with_width(self, width)

    def with_layers(self, kept: tuple[int, ...]) -> Transformer:
        return with_layers(self, kept)

    def axes(self, path: str) -> tuple[str, str]:
        """Logical axis names (in, out) of the weight at a path."""
        name = path.rpartition(".")[2]
        return {
            "q": ("embed", "heads"),
            "k": ("embed", "kv_heads"),
            "v": ("embed", "kv_heads"),
            "o": ("heads", "embed"),
            "gate": ("embed", "mlp"),
            "up": ("embed", "mlp"),
            "down": ("mlp", "embed"),
            "embed": ("embed", "vocab"),
            "head": ("embed", "vocab"),
        }.get(name, ("embed", "other"))


def default_positions(tokens, positions):
    if positions is not None:
        return positions
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


def init(config: Transformer, key: jax.Array) -> Model:
    """A model with random parameters: normal(init_std), outputs scaled by depth."""
    dtype = jnp.dtype(config.policy.param)
    keys = iter(jax.random.split(key, len(config.layers) + 3))
    normal = nn.initializers.normal(config.init_std)
    table = (config.width, config.vocab_size)
    embed = {"weight": normal(next(keys), table, dtype)}
    params: Params = {"embed": embed, "layers": {}}
    hidden = jnp.zeros((1, 2, config.width), jnp.dtype(config.policy.compute))
    values = Pass(jnp.zeros((1, 2), jnp.int32))
    for path, block in config.blocks():
        made = block.module().init(next(keys), hidden, values)["params"]
        params["layers"][path.removeprefix("layers.")] = made
    if config.norm is not None:
        norm = NormModule(config.norm, config.width, dtype)
        params["norm"] = norm.init(next(keys), hidden)["params"]
    if not config.tied:
        params["head"] = {"weight": normal(next(keys), table, dtype)}
    if config.positions:
        rows = config.positions + config.position_offset
        key = jax.random.fold_in(key, 1)
        params["positions"] = {"table": normal(key, (rows, config.width), dtype)}
    return Model(params, config)


def parameter_count(model: Model) -> int:
    """Number of stored parameters of a dense model."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.params))
