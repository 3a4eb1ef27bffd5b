"""What methods need to know about the structure of a transformer, as data.

Sites: linear maps that share an input, and its producer. Residual: who reads the
residual stream and who writes to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from jaxllm.core.model import Residual, Site, Units
from jaxllm.models.config import MLP, Layer, MoE, Norm


def find_sites(config) -> tuple[Site, ...]:
    """The sites of all blocks in order, then that of the head."""
    found = (_layer_sites(path, b.config) for path, b in config.blocks())
    kind = _norm_kind(config.norm)
    last = Site((config.head_path,), "final", "norm", kind, exclusive=False)
    return (*itertools.chain.from_iterable(found), last)


def find_residual(config) -> Residual:
    """Readers and writers of the residual stream, in order."""
    readers, kinds, writers, post = [], [], [], []
    for path, block in config.blocks():
        layer = block.config
        for name, reads, writes in _parts(path, layer):
            readers.append((f"{path}.{name}_norm", reads))
            kinds.append(_residual_kind(layer.norm))
            writers += writes
            after = f"{path}.{name}_post_norm" if layer.post_norm else None
            post += [after] * len(writes)
    readers.append(("norm" if config.norm else None, (config.head_path,)))
    kinds.append(_residual_kind(config.norm))
    return Residual(
        tuple(readers),
        tuple(writers),
        positions="positions" if config.positions else None,
        kinds=tuple(kinds),
        post_norms=tuple(post),
    )


def find_units(config) -> tuple[Units, ...]:
    """Heads and channels that can be removed, in order; routed experts have none."""
    found = []
    for path, block in config.blocks():
        a, f = block.config.attention, block.config.ffn
        if a is not None:
            at = f"{path}.attn"
            qkv = f"{at}.q", f"{at}.k", f"{at}.v"
            found.append(Units(at, "heads", a.kv_heads, qkv, f"{at}.o", f"{at}.mixed"))
        shared = f.shared if isinstance(f, MoE) else f
        if shared is not None:
            at = f"{path}.mlp" if shared is f else f"{path}.moe.shared"
            wide = tuple(f"{at}.{n}" for n in _wide(shared))
            ends = f"{at}.down", f"{at}.hidden"
            found.append(Units(at, "channels", shared.hidden, wide, *ends))
    return tuple(found)


def _norm_kind(norm: Norm | None) -> str:
    return "norm_plus_one" if norm is not None and norm.plus_one else "norm"


def _layer_sites(path: str, layer: Layer) -> list[Site]:
    at = lambda *names: tuple(f"{path}.{n}" for n in names)  # noqa: E731
    kind, found = _norm_kind(layer.norm), []
    a, f = layer.attention, layer.ffn
    if a is not None:
        qkv = at("attn.q", "attn.k", "attn.v")
        found.append(Site(qkv, f"{path}.attn.input", f"{path}.attn_norm", kind))
        groups = dict(repeat=a.heads // a.kv_heads, head_dim=a.head_dim)
        mixed = f"{path}.attn.mixed", f"{path}.attn.v", "linear"
        found.append(Site(at("attn.o"), *mixed, **groups))
    if isinstance(f, MLP):
        found += _mlp_sites(path, "mlp", f, f"{path}.mlp_norm", kind)
    if isinstance(f, MoE):
        # The norm also feeds the router (and the shared expert): see ``residual``.
        e, norm = at("moe.experts.gate", "moe.experts.up"), f"{path}.mlp_norm"
        tap = f"{path}.moe.experts.input"
        found.append(Site(e, tap, norm, kind, exclusive=False))
        down = at("moe.experts.down")
        tap = f"{path}.moe.experts.hidden"
        found.append(Site(down, tap, f"{path}.moe.experts.up"))
        if f.shared is not None:
            found += _mlp_sites(path, "moe.shared", f.shared, norm, kind)
    return found


def _wide(mlp: MLP) -> tuple[str, ...]:
    return ("gate", "up") if mlp.gated else ("up",)


def _mlp_sites(path: str, name: str, mlp: MLP, norm, kind: str) -> list[Site]:
    """A product with ``up`` is linear in it; relu lets positive scales through."""
    linear = mlp.gated or mlp.activation == "relu"
    base, alone = f"{path}.{name}", name == "mlp"
    wide = tuple(f"{base}.{n}" for n in _wide(mlp))
    return [
        Site(wide, f"{base}.input", norm, kind, exclusive=alone),
        Site((f"{base}.down",), f"{base}.hidden", f"{base}.up" if linear else None),
    ]


def _residual_kind(norm: Norm | None) -> str | None:
    if norm is None:
        return None
    return "rms_plus_one" if norm.kind == "rms" and norm.plus_one else norm.kind


def _parts(path: str, layer: Layer) -> Iterator[tuple]:
    """(name, readers, writers) of the attention and feed-forward part of a block."""
    at = lambda part, names: tuple(f"{path}.{part}.{n}" for n in names)  # noqa: E731
    if layer.attention is not None:
        yield "attn", at("attn", "qkv"), at("attn", "o")
    f = layer.ffn
    if isinstance(f, MLP):
        yield "mlp", at("mlp", _wide(f)), at("mlp", ("down",))
    if isinstance(f, MoE):
        reads = ["router", "experts.gate", "experts.up"]
        writes = ["experts.down"]
        if f.shared is not None:
            reads += [f"shared.{n}" for n in _wide(f.shared)]
            reads += ["shared_gate"] if f.shared_gate else []
            writes.append("shared.down")
        yield "mlp", at("moe", reads), at("moe", writes)
