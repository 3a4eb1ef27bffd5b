"""What a model costs: bytes by part and bits per weight, from its stored leaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.core import weights
from jaxllm.core.model import Model, get

PARTS = ("attention", "mlp", "embeddings", "norms", "head", "other")


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of a model's stored leaves.

    Attributes:
      bytes: By part: attention, mlp, embeddings, norms, head, other.
      total: All of them.
      linear_bytes, linear_weights: Bytes and logical entries of the linear maps that
        are compressed (of all linear maps where none is).
      compressed: Number of compressed linear maps.
      parameters: Logical entries of the whole model.
    """

    bytes: dict[str, int]
    total: int
    linear_bytes: int
    linear_weights: int
    compressed: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per logical weight of the compressed linear maps."""
        return 8 * self.linear_bytes / self.linear_weights

    @property
    def bits_per_parameter(self) -> float:
        """Bits per logical parameter of the whole model."""
        return 8 * self.total / self.parameters

    def to_json(self) -> dict[str, Any]:
        bits = dict(
            bits_per_weight=self.bits_per_weight,
            bits_per_parameter=self.bits_per_parameter,
        )
        return dataclasses.asdict(self) | bits

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v:,}" for k, v in self.bytes.items() if v)
        over = "compressed" if self.compressed else "all"
        return (
            f"{self.total:,} bytes ({parts}); {self.bits_per_weight:.3f} bits per "
            f"weight of {over} linear maps, {self.bits_per_parameter:.3f} of the whole model"
        )


def size(model: Model) -> Size:
    """Measured size of a model: the bytes of its leaves, an array shared by two parts
    counted once. Works on abstract models (``jax.eval_shape``) too.

    >>> import jax
    >>> from jaxllm.models import MLP, Attention, Layer, Transformer, init
    >>> layer = Layer(Attention(2, 2, 8), MLP(32))
    >>> model = init(Transformer(32, 16, (layer,)), jax.random.key(0))
    >>> size(model).bits_per_weight
    32.0
    """
    held = dict.fromkeys(PARTS, 0)
    packed: list[Any] = []
    seen: set[int] = set()
    entries = 0
    leaf = lambda x: isinstance(x, weights.Weight)  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(model.params, is_leaf=leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        fresh = [x for x in jax.tree.leaves(node) if id(x) not in seen]
        seen.update(map(id, fresh))
        held[_part(name)] += weights.nbytes(fresh)
        entries += weights.size(node) if fresh else 0
        if weights.compressed(node):
            packed.append(node)
    every = (f"{path}.weight" for path in model.config.linears())
    linear = packed or [get(model.params, path) for path in every]
    count = sum(map(weights.size, linear))
    used = sum(map(weights.nbytes, linear))
    return Size(held, sum(held.values()), used, count, len(packed), entries)


def _part(name: str) -> str:
    """The part of a model that a parameter path belongs to."""
    parts = name.split(".")
    if any("norm" in part for part in parts):
        return "norms"
    found = {
        "embed": "embeddings",
        "positions": "embeddings",
        "head": "head",
        "attn": "attention",
        "mlp": "mlp",
        "moe": "mlp",
    }
    return next((found[part] for part in parts if part in found), "other")
