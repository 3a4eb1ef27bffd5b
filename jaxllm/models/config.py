"""Configuration of a transformer, layer by layer: frozen, hashable, architecture only.

Each layer has its own configuration, since pruning and search make layers unlike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    ``kind`` is ``linear``, ``llama3``, ``yarn`` or ``longrope``; the other fields
    are the names that model cards use. ``short`` and ``long`` are the per-frequency
    factors of longrope for documents of up to ``original_length`` tokens and for longer
    ones; ``attention_factor`` multiplies cosine and sine.
    """

    kind: str
    factor: float = 1.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first ``fraction`` of each head's dimensions.

    ``interleaved`` pairs neighbours (llama2.c, GPT-J), else halves (Hugging Face).
    """

    theta: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMS or layer norm; ``plus_one`` stores the scale as w in (1 + w)."""

    kind: str = "rms"
    eps: float = 1e-5
    plus_one: bool = False

    def __post_init__(self):
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"norm kind {self.kind!r}; accepted: 'rms', 'layer'")


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query attention; ``window`` counts the visible positions, own included.

    ``kv`` is the number format of keys and values (an ``ActivationFormat``): the
    cache stores them packed, and a pass without a cache rounds them alike.
    ``rotate_qk`` applies a Hadamard rotation to queries and keys after the rotary
    embedding, which leaves their products unchanged. ``probabilities`` is the format
    (``Log2``) that the softmax is rounded to.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None = Rope()
    bias: bool = False
    out_bias: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qk_norm: Norm | None = None
    kv: Any = None
    rotate_qk: bool = False
    probabilities: Any = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads do not divide into {self.kv_heads} KV heads"
            )


@dataclasses.dataclass(frozen=True)
class MLP:
    """Two-matrix or gated feed-forward layer of ``hidden`` channels."""

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r}; accepted: {', '.join(ACTIVATIONS)}"
            )


@dataclasses.dataclass(frozen=True)
class MoE:
    """Mixture of ``experts`` gated layers, ``top_k`` per token (softmax routing).

    ``normalize`` rescales the chosen probabilities to sum to one; ``shared`` is an
    expert that every token visits, weighted by a sigmoid gate when ``shared_gate``.
    """

    experts: int
    top_k: int
    hidden: int
    activation: str = "silu"
    normalize: bool = True
    shared: MLP | None = None
    shared_gate: bool = False

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k} of {self.experts} experts")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block: attention and feed-forward part, either of which may be absent.

    ``post_norm`` adds a norm to each part's output (Gemma 2, 3); ``parallel`` feeds
    both parts from the block's input (GPT-NeoX). ``tokens`` is a ``TokenRule``: which
    tokens leave behind the attention, and which are rounded further.
    """

    attention: Attention | None
    ffn: MLP | MoE | None
    norm: Norm = Norm()
    post_norm: bool = False
    parallel: bool = False
    tokens: Any = None

    def __post_init__(self):
        if self.tokens is not None and self.attention is None:
            raise ValueError("a layer without attention cannot choose tokens by it")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Data types: parameters at initialisation, activations; sums are in float32."""

    param: str = "float32"
    compute: str = "float32"
