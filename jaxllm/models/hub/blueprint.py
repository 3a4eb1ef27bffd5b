"""The flat description between a ``config.json`` and a ``Transformer``."""

from __future__ import annotations

import dataclasses
import math

from jaxllm.models.config import MLP, Attention, Layer, MoE, Norm, Policy, Rope
from jaxllm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A transformer whose layers differ only in window, rotary base and sparsity.

    ``kv_heads``, ``head_dim`` and ``hidden`` of None mean: as many as ``heads``,
    ``width / heads``, ``4 width``. ``windowed`` and ``sparse`` have one entry per
    layer; ``local_rope`` is that of windowed layers (None: the same).
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    max_length: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    norm: str = "rms"
    eps: float = 1e-6
    plus_one: bool = False
    post_norm: bool = False
    parallel: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: bool = False
    tied: bool = False
    learned_positions: bool = False
    position_offset: int = 0
    init_std: float = 0.02
    rope: Rope | None = None
    local_rope: Rope | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    experts: int = 0
    top_k: int = 1
    expert_hidden: int = 0
    normalize: bool = True
    shared_hidden: int = 0
    shared_gate: bool = False
    sparse: tuple[bool, ...] = ()

    def build(self, family: str, policy: Policy) -> Transformer:
        """The configuration that this blueprint describes."""
        norm = Norm(self.norm, self.eps, self.plus_one)
        return Transformer(
            vocab_size=self.vocab_size,
            width=self.width,
            layers=tuple(self._layer(i, norm) for i in range(self.depth)),
            norm=norm,
            tied=self.tied,
            embed_scale=math.sqrt(self.width) if self.embed_scale else None,
            positions=self.max_length if self.learned_positions else 0,
            position_offset=self.position_offset,
            logit_softcap=self.logit_softcap,
            max_length=self.max_length,
            init_std=self.init_std,
            policy=policy,
            family=family,
        )

    def _layer(self, i: int, norm: Norm) -> Layer:
        ffn = self._moe() if self.sparse[i] else self._mlp(self.hidden)
        attention = self._attention(self.windowed[i], norm)
        return Layer(attention, ffn, norm, self.post_norm, self.parallel)

    def _attention(self, windowed: bool, norm: Norm) -> Attention:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} and {self.heads} heads do not divide")
        local = windowed and self.local_rope is not None
        return Attention(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // self.heads,
            rope=self.local_rope if local else self.rope,
            bias=self.qkv_bias,
            out_bias=self.out_bias,
            window=self.window if windowed else None,
            scale=self.scale,
            softcap=self.softcap,
            qk_norm=norm if self.qk_norm else None,
        )

    def _mlp(self, hidden: int | None) -> MLP:
        hidden = hidden or 4 * self.width
        return MLP(hidden, self.activation, self.gated, self.mlp_bias)

    def _moe(self) -> MoE:
        shared = self._mlp(self.shared_hidden) if self.shared_hidden else None
        return MoE(
            self.experts,
            self.top_k,
            self.expert_hidden,
            self.activation,
            self.normalize,
            shared,
            shared is not None and self.shared_gate,
        )


def describe(config: Transformer) -> Blueprint:
    """The blueprint nearest to a configuration; exact iff it builds an equal one."""
    layers = config.layers
    attention = next((x.attention for x in layers if x.attention), None)
    dense = next((x.ffn for x in layers if isinstance(x.ffn, MLP)), None)
    moe = next((x.ffn for x in layers if isinstance(x.ffn, MoE)), None)
    if attention is None or dense is moe:
        raise ValueError("a model without attention or feed-forward has no such form")
    windows = [x.attention.window if x.attention else None for x in layers]
    ropes = {bool(w): x.attention.rope for w, x in _with_attention(windows, layers)}
    rope = ropes.get(False, ropes.get(True))
    local = ropes.get(True)
    norm = layers[0].norm
    return Blueprint(
        vocab_size=config.vocab_size,
        width=config.width,
        depth=len(layers),
        heads=attention.heads,
        max_length=config.max_length,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        hidden=(dense or moe).hidden,
        activation=(dense or moe).activation,
        gated=dense.gated if dense else True,
        mlp_bias=dense.bias if dense else False,
        qkv_bias=attention.bias,
        out_bias=attention.out_bias,
        norm=norm.kind,
        eps=norm.eps,
        plus_one=norm.plus_one,
        post_norm=layers[0].post_norm,
        parallel=layers[0].parallel,
        qk_norm=attention.qk_norm is not None,
        scale=attention.scale,
        softcap=attention.softcap,
        logit_softcap=config.logit_softcap,
        embed_scale=config.embed_scale is not None,
        tied=config.tied,
        learned_positions=bool(config.positions),
        position_offset=config.position_offset,
        init_std=config.init_std,
        rope=rope,
        local_rope=None if local == rope else local,
        window=next((w for w in windows if w), None),
        windowed=tuple(w is not None for w in windows),
        sparse=tuple(isinstance(x.ffn, MoE) for x in layers),
        **_describe_moe(moe),
    )


def _with_attention(windows, layers):
    pairs = zip(windows, layers, strict=True)
    return [(w, x) for w, x in pairs if x.attention is not None]


def _describe_moe(moe: MoE | None) -> dict:
    if moe is None:
        return {}
    return dict(
        experts=moe.experts,
        top_k=moe.top_k,
        expert_hidden=moe.hidden,
        normalize=moe.normalize,
        shared_hidden=moe.shared.hidden if moe.shared else 0,
        shared_gate=moe.shared_gate,
    )


def difference(a, b, path: str = "") -> str | None:
    """Where two configurations first differ: ``layers.1.attention.window: 4 and 8``."""
    if a == b:
        return None
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif dataclasses.is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in dataclasses.fields(a) if f.compare]
        pairs = [(n, getattr(a, n), getattr(b, n)) for n in names]
    else:
        return f"{path.strip('.')}: {a!r} and {b!r}"
    found = (difference(x, y, f"{path}.{name}") for name, x, y in pairs)
    return next((text for text in found if text), None)
