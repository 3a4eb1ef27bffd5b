"""Shapes of real models that the ops' cases are made of."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear map of a model: [inputs, outputs]."""

    model: str
    layer: str
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.layer}"


@dataclasses.dataclass(frozen=True)
class Heads:
    """The attention of a model: query heads, key/value heads, head width."""

    model: str
    queries: int
    groups: int
    width: int


LLAMA3_8B = (
    Linear("llama3-8b", "qkv", 4096, 6144),
    Linear("llama3-8b", "o", 4096, 4096),
    Linear("llama3-8b", "gate_up", 4096, 28672),
    Linear("llama3-8b", "down", 14336, 4096),
    Linear("llama3-8b", "lm_head", 4096, 128256),
)
QWEN25_7B = (
    Linear("qwen2.5-7b", "qkv", 3584, 4608),
    Linear("qwen2.5-7b", "gate_up", 3584, 37888),
    Linear("qwen2.5-7b", "down", 18944, 3584),
)
# Small enough for the interpreter; the last has a short block and odd sizes.
TINY = (
    Linear("tiny", "square", 256, 256),
    Linear("tiny", "up", 256, 384),
    Linear("tiny", "ragged", 172, 100),
)

LLAMA3_8B_HEADS = Heads("llama3-8b", 32, 8, 128)
QWEN25_7B_HEADS = Heads("qwen2.5-7b", 28, 4, 128)
TINY_HEADS = Heads("tiny", 4, 2, 64)
