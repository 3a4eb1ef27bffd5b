"""bfloat16 weights without loss: exponents as a Huffman code, the rest as bytes."""

from __future__ import annotations

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.weights.base import Names, Weight

LONGEST = 24  # bits of a code: with 7 bits of offset it fits a window of 32
CHUNK = 256  # weights that one scan decodes; each chunk stores where it begins


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntropyCoded(Weight):
    """The entries of [out, in] in order: sign and fraction bytes, coded exponents.

    ``rest`` [out * in] holds the sign and the seven fraction bits; ``stream`` the
    canonical Huffman codes, ``starts`` [chunks] their first bits. Among codes of l
    bits, ``last[l - 1]`` is the largest 32-bit window that begins with one of at most
    l bits (zero where all are longer), ``symbols[first[l - 1] + code]`` its exponent.
    """

    rest: Leaf[UInt8[Array, "*lead entries"]]
    stream: Leaf[UInt8[Array, "*lead bytes"]]
    starts: Leaf[UInt32[Array, "*lead chunks"]]
    last: Leaf[UInt32[Array, "*lead lengths"]]
    first: Leaf[Int[Array, "*lead lengths"]]
    symbols: Leaf[UInt8[Array, "*lead symbols"]]
    features: int = static()
    outputs: int = static()
    dtype: str = static("bfloat16")

    @classmethod
    def of(cls, dense) -> EntropyCoded:
        """Encode a concrete matrix [in, out] whose values are those of bfloat16s."""
        exact = np.asarray(jnp.asarray(dense).astype(jnp.bfloat16))
        if not np.array_equal(exact.astype(np.float32), np.asarray(dense, np.float32)):
            raise ValueError("the values are no bfloat16 numbers: cast them first")
        words = np.ascontiguousarray(exact.T).view(np.uint16).ravel()
        exponents = ((words >> 7) & 0xFF).astype(np.uint8)
        rest = (((words >> 8) & 0x80) | (words & 0x7F)).astype(np.uint8)
        lengths = code_lengths(np.bincount(exponents, minlength=256))
        codes, last, first, symbols = canonical(lengths)
        stream, starts = _written(codes[exponents], lengths[exponents])
        features, outputs = exact.shape
        return cls(
            rest=jnp.asarray(rest),
            stream=jnp.asarray(stream),
            starts=jnp.asarray(starts),
            last=jnp.asarray(last),
            first=jnp.asarray(first),
            symbols=jnp.asarray(symbols),
            features=features,
            outputs=outputs,
            dtype=str(dense.dtype),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.outputs

    def materialize(self) -> Float[Array, "*lead in out"]:
        decode = _exponents
        for _ in self.rest.shape[:-1]:
            decode = jax.vmap(decode)
        tables = self.last, self.first, self.symbols
        exponents = decode(self.stream, self.starts, *tables)
        exponents = exponents[..., : self.rest.shape[-1]].astype(jnp.uint16)
        rest = self.rest.astype(jnp.uint16)
        words = (rest & 0x80) << 8 | exponents << 7 | (rest & 0x7F)
        values = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
        dense = values.reshape(*values.shape[:-1], self.outputs, self.features)
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def axes(self, names: Names) -> EntropyCoded:
        """One stream cannot be split: no axis names."""
        return jax.tree.map(lambda _: (None,), self)


def code_lengths(counts) -> np.ndarray:
    """Bits of each symbol's Huffman code [symbols], at most ``LONGEST``; 0: unused."""
    used = np.flatnonzero(counts)
    if len(used) == 1:
        return (np.arange(len(counts)) == used[0]).astype(np.int64)
    floor = counts.sum() / 2 ** (LONGEST - 4)  # rarer symbols only lengthen the codes
    heap: list[tuple[float, int, tuple[int, ...]]]
    heap = [(max(float(counts[s]), floor), int(s), (int(s),)) for s in used]
    heapq.heapify(heap)
    lengths = np.zeros(len(counts), np.int64)
    while len(heap) > 1:
        (a, i, one), (b, _, two) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[[*one, *two]] += 1
        heapq.heappush(heap, (a + b, i, (*one, *two)))
    return lengths


def canonical(lengths):
    """(codes, last, first, symbols) of the canonical code with these lengths."""
    symbols = np.array(sorted(np.flatnonzero(lengths), key=lambda s: (lengths[s], s)))
    codes = np.zeros(len(lengths), np.uint32)
    last, first = np.zeros(LONGEST, np.uint32), np.zeros(LONGEST, np.int32)
    code = done = 0
    for bits in range(1, LONGEST + 1):
        mine = symbols[lengths[symbols] == bits]
        codes[mine] = code + np.arange(len(mine))
        first[bits - 1] = done - code
        code, done = code + len(mine), done + len(mine)
        last[bits - 1] = max((code << (32 - bits)) - 1, 0)
        code <<= 1
    last[lengths.max() - 1 :] = np.uint32(0xFFFFFFFF)
    return codes, last, first, symbols.astype(np.uint8)


def _written(codes, lengths):
    """The codes as bytes, first bit highest, and the first bit of every chunk."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    bits = np.zeros(int(ends[-1]) + 40, np.uint8)  # a window may read past the end
    for b in range(int(lengths.max())):
        longer = lengths > b
        shift = (lengths[longer] - 1 - b).astype(np.uint32)
        bits[begins[longer] + b] = (codes[longer] >> shift) & 1
    return np.packbits(bits), begins[::CHUNK].astype(np.uint32)


def _exponents(stream, starts, last, first, symbols):
    """All chunks side by side, weight after weight: [chunks * CHUNK]."""

    def one(at, _):
        byte = (at >> 3)[:, None] + jnp.arange(4, dtype=jnp.uint32)[None]
        four = stream[byte].astype(jnp.uint32)
        window = four[:, 0] << 24 | four[:, 1] << 16 | four[:, 2] << 8 | four[:, 3]
        window = window << (at & 7)
        longer = (window[:, None] > last[None]) | (last == 0)[None]
        bits = 1 + longer.sum(1, dtype=jnp.uint32)
        code = (window >> (32 - bits)).astype(jnp.int32)
        return at + bits, symbols[first[bits - 1] + code]

    found = jax.lax.scan(one, starts, length=CHUNK)[1]
    return found.T.reshape(-1)
