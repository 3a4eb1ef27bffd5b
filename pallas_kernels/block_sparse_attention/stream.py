"""TPU: listed blocks flow from HBM through two buffers, several blocks a step."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.reference import NEGATIVE

FAR = 2**30  # later than any position: masks what a list does not hold


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernels know while tracing. A step takes ``chunk`` listed blocks."""

    block_q: int
    block_k: int
    share: int  # query heads of a key head
    dim: int
    keys: int
    offset: int  # position of the first query
    causal: bool
    scale: float
    soft_cap: float | None
    chunk_q: int
    chunk_k: int
    interpret: bool

    def scores(self, rows, columns):
        """float32 cap(scale rows columns^T)."""
        s = self.scale * dot(rows, columns, transpose=True)
        return (
            s if self.soft_cap is None else self.soft_cap * jnp.tanh(s / self.soft_cap)
        )

    def slope(self, scores):
        """d cap(scale x) / dx where the capped score is ``scores``."""
        if self.soft_cap is None:
            return self.scale
        return self.scale * (1 - (scores / self.soft_cap) ** 2)

    def mask(self, scores, queries, keys):
        """Scores where the query at a position sees the key at another."""
        last = jnp.minimum(queries, self.keys - 1) if self.causal else self.keys - 1
        return jnp.where(keys <= last, scores, NEGATIVE)


def dot(a, b, transpose: bool = False):
    """a b, or a b^T, in float32."""
    contract = ((1,), (1 if transpose else 0,))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contract, ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def positions(ids, step, chunk: int, block: int):
    """int32[1, chunk * block]: where the keys or queries of a step stand.

    ``ids`` [1, 1, 1 + width] holds the count and then the listed blocks.
    """
    lane = lax.broadcasted_iota(jnp.int32, (1, chunk * block), 1)
    place = jnp.zeros_like(lane)
    for n in range(chunk):
        entry = step * chunk + n
        start = jnp.where(entry < ids[0, 0, 0], listed_id(ids, entry) * block, FAR)
        within = (lane >= n * block) & (lane < (n + 1) * block)
        place = jnp.where(within, start + lane - n * block, place)
    return place


def listed_id(ids, entry):
    """The block that an entry names; beyond the list, its last."""
    return ids[0, 0, 1 + jnp.clip(entry, 0, ids[0, 0, 0] - 1)]


def stream(ids, chunk: int, sources, buffers, semaphores, body) -> None:
    """``body(step, slot)`` for each chunk of the list, the next one on its way.

    A source gives the reference of a block in HBM by id; its buffer
    [2, chunk, ...] receives it. ``semaphores`` are [2, len(sources)].
    """
    steps = lax.div(ids[0, 0, 0] + chunk - 1, chunk)

    def copies(step, slot):
        for n in range(chunk):
            block = listed_id(ids, step * chunk + n)
            for m, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
                yield pltpu.make_async_copy(
                    source(block), buffer.at[slot, n], semaphores.at[slot, m]
                )

    def start(step, slot):
        for copy in copies(step, slot):
            copy.start()

    @pl.when(steps > 0)
    def _():
        start(0, 0)

    def advance(step, carry):
        slot = lax.rem(step, 2)

        @pl.when(step + 1 < steps)
        def _():
            start(step + 1, 1 - slot)

        for copy in copies(step, slot):
            copy.wait()
        body(step, slot)
        return carry

    lax.fori_loop(0, steps, advance, 0)


def merged(buffer, slot):
    """The blocks of a buffer's slot one below the other: [chunk * block, dim]."""
    tile = buffer[slot]
    return tile.reshape(tile.shape[0] * tile.shape[1], tile.shape[2])
