"""The key-value cache: slot t of a row holds the keys and values of position t."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import QuantizedCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values [batch, slots, kv_heads, head_dim], packed when ``format`` is.

    Writing is idempotent per position, so rolling back is just writing again.
    """

    keys: Any
    values: Any
    format: Any = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def empty(cls, batch: int, length: int, attention, dtype) -> LayerCache:
        shape = (batch, length, attention.kv_heads, attention.head_dim)
        blank = jnp.zeros(shape, dtype)
        if attention.kv is None:
            return cls(blank, blank)
        packed = attention.kv.encode(blank)
        return cls(packed, packed, attention.kv)

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[1]

    def write(self, k, v, positions, segments=None) -> LayerCache:
        """Put new entries at their positions; padding (segment 0) is dropped."""
        slot = positions
        if segments is not None:
            slot = jnp.where(segments > 0, positions, self.length)
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
