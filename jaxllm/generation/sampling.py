"""How the next token is chosen from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

_static = dict(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """A distribution over the next token, made of logits.

    The numbers are data, so that another temperature does not compile again; only
    whether there is sampling at all, and truncation, is static. Tokens from ``size``
    on (padded rows of an embedding) are never chosen.
    """

    size: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    greedy: bool = dataclasses.field(**_static)
    truncated: bool = dataclasses.field(**_static)

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        vocab_size: int = 2**31 - 1,
    ) -> Sampler:
        """A checked sampler of ids below ``vocab_size``; temperature 0 is greedy.

        Raises:
          ValueError: A temperature below 0, top_k below 1 or top_p outside (0, 1].
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(
                f"temperature is {temperature}, expected 0 (greedy) or a number above"
            )
        if top_k is not None and (top_k != int(top_k) or top_k < 1):
            raise ValueError(f"top_k is {top_k}, expected 1 or more, or None")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, expected a number in (0, 1], or None")
        truncated = top_k is not None or top_p is not None
        return cls(
            np.int32(vocab_size),
            np.float32(temperature),
            np.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
            np.float32(1.0 if top_p is None else top_p),
            temperature == 0,
            truncated,
        )

    def __call__(
        self, keys: Key[Array, " batch"], logits: Float[Array, "batch vocab"]
    ) -> Int[Array, " batch"]:
        """One token for each row, drawn with that row's own key."""
        known = jnp.arange(logits.shape[-1]) < self.size
        logits = jnp.where(known, logits, -jnp.inf)
        if self.greedy:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        draw = jax.vmap(jax.random.categorical)
        scaled = logits / self.temperature
        if not self.truncated:
            return draw(keys, scaled).astype(jnp.int32)
        order = jnp.argsort(scaled, -1, descending=True)
        ranked = jnp.take_along_axis(scaled, order, -1)
        ranked = truncate(ranked, self.top_k, self.top_p)
        choice = draw(keys, ranked)[:, None]
        return jnp.take_along_axis(order, choice, -1)[:, 0].astype(jnp.int32)


def truncate(
    ranked: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Falling logits with -inf beyond the first k, then beyond the nucleus.

    The nucleus is the shortest prefix that holds at least ``top_p`` of what top-k left
    (Holtzman et al. 2020, arXiv:1904.09751); the first token always stays. Of equal
    logits at the limit, the lower ids stay: exactly k tokens remain.
    """
    rank = jnp.arange(ranked.shape[-1])
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    share = jax.nn.softmax(ranked, -1)
    before = jnp.cumsum(share, -1) - share
    inside = (before < top_p) | (top_p >= 1) | (rank == 0)
    return jnp.where(inside, ranked, -jnp.inf)
