"""The key-value cache: slot t of a row holds the keys and values of position t.

Behind layers that drop tokens, slots hold the tokens that were left, in order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.packing import parts
from pallas_kernels.decode_attention import QuantizedCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values [batch, slots, kv_heads, head_dim], packed when ``format`` is.

    Writing is idempotent per position, so rolling back is just writing again.
    ``skipped`` [batch] counts the positions whose tokens did not reach the layer (None
    where no layer drops any); the room that they leave is kept for later ones.
    """

    keys: Any
    values: Any
    format: Any = dataclasses.field(default=None, metadata=dict(static=True))
    skipped: Any = None

    @classmethod
    def empty(
        cls, batch: int, length: int, attention, dtype, *, drops: bool = False
    ) -> LayerCache:
        """Room for ``length`` positions; ``drops``: some layer drops tokens."""
        shape = (batch, length, attention.kv_heads, attention.head_dim)
        kept = jnp.zeros(shape, dtype)
        if attention.kv is not None:
            kept = attention.kv.encode(kept)
        skipped = jnp.zeros(batch, jnp.int32) if drops else None
        return cls(kept, kept, attention.kv, skipped)

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[1]

    def slots(self, positions, stream=None):
        """Where the tokens of a pass go: ``positions`` less what is missing before."""
        if self.skipped is None:
            return positions
        slots = positions - self.skipped[:, None]
        return slots if stream is None else slots - stream.before

    def without(self, stream) -> LayerCache:
        """The cache once it is known how many tokens of a pass did not reach it."""
        if self.skipped is None or stream is None:
            return self
        return dataclasses.replace(self, skipped=self.skipped + stream.dropped)

    def write(self, k, v, slot, segments=None) -> LayerCache:
        """Put new entries at their slots; padding (segment 0) is dropped.

        Raises ``ValueError`` for more entries than slots.
        """
        if k.shape[1] > self.length:
            raise ValueError(
                f"a pass of {k.shape[1]} tokens for a cache of {self.length} slots; "
                "accepted: as many tokens as slots at most"
            )
        if segments is not None:
            slot = jnp.where(segments > 0, slot, self.length)
        row = jnp.arange(k.shape[0])[:, None]
        if self.format is not None:
            k, v = self.format.encode(k), self.format.encode(v)
        store = lambda old, new: old.at[row, slot].set(  # noqa: E731
            new.astype(old.dtype), mode="drop"
        )
        keys = jax.tree.map(store, self.keys, k)
        values = jax.tree.map(store, self.values, v)
        return dataclasses.replace(self, keys=keys, values=values)

    @property
    def direct(self) -> bool:
        """Whether ``pallas_kernels.decode_attention`` reads what is stored: integers
        in equal blocks and whole bytes. Other formats are decoded first.
        """
        if self.format is None:
            return True
        width, block = self.keys.width, self.format.block or self.keys.width
        whole = all(width * part % 8 == 0 for part in parts(self.format.bits))
        return self.format.element is None and whole and width % min(block, width) == 0

    @property
    def stored(self):
        """Keys and values as ``pallas_kernels.decode_attention`` reads them."""
        if self.format is None:
            return self.keys, self.values
        return tuple(map(self._packed, (self.keys, self.values)))

    def _packed(self, e) -> QuantizedCache:
        zero, form = e.zero, self.format.format
        if zero is None and form.bits == 1:  # its codes stand for -1/2 and 1/2
            zero = jnp.full(e.scale.shape, form.offset, e.scale.dtype)
        return QuantizedCache(e.codes, e.scale, zero, form.bits)

    def read(self, dtype):
        """All keys and values, decoded to ``dtype``."""
        if self.format is None:
            return self.keys.astype(dtype), self.values.astype(dtype)
        decode = self.format.decode
        return decode(self.keys).astype(dtype), decode(self.values).astype(dtype)
