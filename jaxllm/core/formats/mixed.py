"""Activations whose channel blocks differ in width."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.core.formats.activation import ActivationFormat


@dataclasses.dataclass(frozen=True)
class MixedActivation(ActivationFormat):
    """Blocks of channels in ``bits``; the first ones, a ``share``, in ``wide`` bits.

    Every token and block has its own scale. Both widths are integers of one int8
    product; a cache, which stores one width, refuses.
    """

    wide: int | Any = 8  # text and files give anything: checked below
    share: float = 0.125

    def __post_init__(self):
        super().__post_init__()
        ActivationFormat(self.wide)
        if self.block is None or self.element is not None:
            raise ValueError("mixed widths need a block of channels, and integers")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {self.share}; accepted: 0 to 1")

    def channels(self, width: int) -> int:
        """How many of ``width`` channels are wide: whole blocks, rounded up."""
        size = self.block or width  # a block is always given: see __post_init__
        blocks = -(-width // size)
        return min(-int(-self.share * blocks // 1) * size, width)

    def _parts(self, x):
        """The two formats, each with the channels that it rounds."""
        at = self.channels(x.shape[-1])
        narrow = ActivationFormat(self.bits, self.symmetric, self.block, self.clip)
        wide = dataclasses.replace(narrow, bits=self.wide)
        pairs = (wide, x[..., :at]), (narrow, x[..., at:])
        return [(format, part) for format, part in pairs if part.shape[-1]]

    def round(self, x):
        return jnp.concatenate([f.round(part) for f, part in self._parts(x)], -1)

    def integers(self, x):
        found = [f.integers(part) for f, part in self._parts(x)]
        codes, scales = zip(*found, strict=True)
        return jnp.concatenate(codes, -1), jnp.concatenate(scales, -1)

    def encode(self, x):
        raise TypeError(f"{self} cannot be stored: its channels differ in width")

    decode = encode
