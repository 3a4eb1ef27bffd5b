"""Streams: tokens on their way through a model's layers, some of which leave.

A rule is part of a layer. It acts in passes of several tokens, behind the layer's
attention, which its score reads. What is dropped is gone: later layers see fewer
tokens, and the states that dropped ones had reached wait beside the stream, so that a
pass still ends with one state for each token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.core.arrays import Leaf
from jaxllm.core.formats import ActivationFormat

SLACK = 32  # one slot in so many is spare where shares are rounded document by document


class View(NamedTuple):
    """What a score sees of a layer's attention p, which is never formed.

    ``mix`` takes values [batch, length] to sum_t p[i, t] values[t], the mean over
    heads. ``first`` marks the first token of each document; ``seen`` counts the tokens
    that may look at each one, itself included.
    """

    mix: Callable[[Float[Array, "batch length"]], Float[Array, "batch length"]]
    first: Bool[Array, "batch length"]
    seen: Int[Array, "batch length"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """What a rule chose in a layer: ``low`` tokens to round, and tokens that stay.

    ``slots`` are the places of those that go on, in order; where a row has fewer that
    stay than others, the slots that are left over hold tokens that do not. Both are
    None where all stay.
    """

    low: Leaf[Bool[Array, "batch length"]]
    stays: Leaf[Bool[Array, "batch length"] | None] = None
    slots: Leaf[Int[Array, "batch kept"] | None] = None

    @property
    def marks(self) -> Choice:
        """The tokens to round alone."""
        return Choice(self.low)


@dataclasses.dataclass(frozen=True)
class TokenRule:
    """Drop the share ``drop`` of least score, round the next ``lower`` to ``format``.

    Every document of a row loses these shares of its own tokens, rounded down; its
    first and last token stay. Only in rows of more documents than spare slots some lose
    one token more. A token that is rounded in one layer is rounded in all later ones
    that have a rule.
    """

    score: Any
    drop: float = 0.0
    lower: float = 0.0
    format: ActivationFormat | None = None

    def __post_init__(self):
        for name in ("drop", "lower"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise ValueError(f"{name} {share}; accepted: 0 <= {name} < 1")
        if self.drop + self.lower > 1:
            raise ValueError(f"drop {self.drop} and lower {self.lower} exceed 1")
        if self.lower and self.format is None:
            raise ValueError(f"lower {self.lower} without a format to round to")

    def choose(self, mix, segments, low: Bool[Array, "batch length"]) -> Choice:
        """The choice in one layer; ``low`` are the tokens that were low before."""
        length = low.shape[1]
        if not self.drop and not self.lower:
            return Choice(low)
        start, end = spans(low.shape, segments)
        place = jnp.arange(length, dtype=jnp.int32)[None]
        view = View(mix, place == start, end - place)
        rank = ranks(self.score(view).astype(jnp.float32), start, end)
        count = end - start
        part = lambda share: jnp.asarray(_part(share, length))[count]  # noqa: E731
        low = low | (rank >= count - part(self.drop + self.lower))
        gone = int(_part(self.drop, length)[length])
        if not gone:
            return Choice(low)
        if segments is not None:
            gone -= min(gone, -(-length // SLACK))
        stays = rank < count - part(self.drop)
        order = jnp.where(stays if segments is None else stays & (segments > 0), 0, 1)
        slots = jnp.lexsort((rank, order), axis=1)[:, : length - gone]
        return Choice(low, stays, jnp.sort(slots, axis=1).astype(jnp.int32))

    def lowered(self, x: Float[Array, "batch length width"], low) -> Array:
        """``x`` with its low tokens rounded."""
        if self.format is None:
            return x
        return jnp.where(low[..., None], self.format.round(x), x)


def _part(share: float, length: int) -> np.ndarray:
    """How many of 0, 1 ... ``length`` tokens a share is, the first and last spared."""
    counts = [min(int(n * share), max(n - 2, 0)) for n in range(length + 1)]
    return np.array(counts, np.int32)


def spans(shape: tuple[int, ...], segments) -> tuple[Array, Array]:
    """Where each token's document starts in its row and where it ends (exclusive).

    ``segments`` [batch, length] number the documents; None is one a row.
    """
    length = shape[1]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    if segments is None:
        return jnp.zeros_like(place), jnp.full_like(place, length)
    edge = segments[:, 1:] != segments[:, :-1]
    opens = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True)
    closes = jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
    start = lax.cummax(jnp.where(opens, place, 0), axis=1)
    end = lax.cummin(jnp.where(closes, place + 1, length), axis=1, reverse=True)
    return start, end


def ranks(score, start, end) -> Int[Array, "batch length"]:
    """Each token's rank in its document by falling score; its ends come first."""
    place = jnp.arange(score.shape[1], dtype=jnp.int32)[None]
    ends = (place == start) | (place == end - 1)
    order = jnp.lexsort((jnp.where(ends, -jnp.inf, -score), start), axis=1)
    return jnp.argsort(order, axis=1).astype(jnp.int32) - start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The tokens on their way through a model's layers.

    ``origin`` is each one's place in the pass (its length for a slot left over),
    ``before`` how many were dropped in front of it, ``low`` whether it is rounded
    further. ``parked`` has for all tokens of the pass the states that dropped ones had
    reached; ``dropped`` counts those, without padding.
    """

    positions: Leaf[Int[Array, "batch kept"]]
    segments: Leaf[Int[Array, "batch kept"] | None]
    origin: Leaf[Int[Array, "batch kept"]]
    before: Leaf[Int[Array, "batch kept"]]
    low: Leaf[Bool[Array, "batch kept"]]
    parked: Leaf[Float[Array, "batch length width"]]
    dropped: Leaf[Int[Array, " batch"]]

    @classmethod
    def start(cls, hidden, positions, segments) -> Stream:
        """All tokens of a pass."""
        shape = hidden.shape[:2]
        place = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        none = jnp.zeros_like(place)
        count = jnp.zeros(shape[0], jnp.int32)
        low = jnp.zeros(shape, bool)
        return cls(positions, segments, place, none, low, hidden, count)

    def follow(self, choice: Choice, hidden) -> tuple[Array, Stream]:
        """The states of the tokens that go on, and their stream.

        Left over slots are padding (segment 0) from here on.
        """
        segments, stays = self.segments, choice.stays
        if choice.slots is None or stays is None:
            return hidden, dataclasses.replace(self, low=choice.low)
        gone = ~stays if segments is None else ~stays & (segments > 0)
        if segments is not None:
            segments = jnp.where(stays, segments, 0)
        passed = jnp.cumsum(gone, axis=1, dtype=jnp.int32)
        take = lambda a: None if a is None else jnp.take_along_axis(a, choice.slots, 1)  # noqa: E731
        stream = Stream(
            take(self.positions),
            take(segments),
            take(jnp.where(stays, self.origin, self.parked.shape[1])),
            take(self.before + passed),
            take(choice.low),
            self.restored(hidden),
            self.dropped + passed[:, -1],
        )
        return jnp.take_along_axis(hidden, choice.slots[..., None], 1), stream

    def restored(self, hidden) -> Float[Array, "batch length width"]:
        """One state for each token of the pass: ``hidden``, else what was parked."""
        place = _rows(self.origin), self.origin
        return self.parked.at[place].set(hidden, mode="drop")


def _rows(index):
    return jnp.arange(len(index), dtype=jnp.int32)[:, None]
