"""Text generation: one compiled loop over steps with the key-value cache as carry.

A batch is padded to few shapes (rows, prompt length, cache slots), so that calls share
compilations. Row i depends on prompt i, the seed and i alone: its tokens sit at its own
positions of the cache, and padding is never written.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.core.model import Model
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary
from jaxllm.generation.sampling import Sampler

# Steps between two looks for stop strings, which only the host can find.
STRIDE = 16
SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Attributes:
      text: The new text; a stop string and what follows it are cut off.
      tokens: The new ids, up to and including the one that ended the text.
      finish: ``eos``, ``stop`` (a stop string) or ``length``.
      prompt_tokens: Ids of the prompt.
      logprobs: Log-probability of each new token under the model itself (temperature
        1, nothing truncated), where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.text


class Prompts(NamedTuple):
    """Right-padded prompts, each with the number of its random stream.

    A row of ``length`` 0 is no prompt at all.
    """

    tokens: Int[Array, "batch width"]
    length: Int[Array, " batch"]
    limit: Int[Array, " batch"]
    seed: Int[Array, ""]
    streams: Int[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Carry of the loop. ``tokens`` holds each row's prompt and what follows it.

    A row has ``length`` tokens, of which the last is not in the cache yet, and ends at
    ``limit`` tokens at the latest.
    """

    cache: Any
    tokens: Int[Array, "batch slots"]
    logprobs: Float[Array, "batch slots"]
    length: Int[Array, " batch"]
    limit: Int[Array, " batch"]
    alive: Bool[Array, " batch"]
    keys: Key[Array, " batch"]


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    eos: int | Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    logprobs: bool = False,
) -> list[Generation]:
    """Continues prompts.

    Args:
      model: Any causal model with ``config.empty_cache`` and ``config.rereads``.
      tokenizer: The model's tokenizer; may be None for prompts of token ids. Only
        its ids are chosen, where the model has more rows.
      prompts: One text, texts, or token ids of each prompt (with BOS where wanted).
      max_new_tokens: New tokens of a row at most; the model's length is a limit too.
      temperature: 0 takes the likeliest token; else logits are divided by it.
      top_k, top_p: Truncate the distribution, top-k first; see ``sampling.truncate``.
      stop: Strings that end a text, found across token boundaries too.
      eos: Ids that end a text; the tokenizer's by default, ``()`` for none.
      seed: Of the draws; row i has its own stream.
      batch_size: Rows that run together.
      logprobs: Also return log-probabilities.

    Raises:
      ValueError: A prompt that is empty or leaves no room in the model's length, a
        setting out of range, a tokenizer of another vocabulary.
      TypeError: Text prompts or stop strings without a tokenizer.
    """
    known = (model.config if tokenizer is None else tokenizer).vocab_size
    sampler = Sampler.of(temperature, top_k, top_p, known)
    stops = check_stops(stop, tokenizer)
    ids = encode_prompts(model, tokenizer, prompts)
    check_lengths(model, ids, max_new_tokens, batch_size)
    ends = end_ids(eos, tokenizer)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    finished: dict[int, Generation] = {}
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        batch = [ids[i] for i in rows]
        prompts, slots = pad(model, batch, max_new_tokens, seed, rows)
        state = prefill(model, prompts, sampler, ends, slots)
        done = _run(model, tokenizer, state, batch, sampler, ends, stops)
        finished |= dict(zip(rows, done, strict=True))
    drop = {} if logprobs else {"logprobs": None}
    return [dataclasses.replace(finished[i], **drop) for i in range(len(ids))]


def encode_prompts(
    model: Model, tokenizer: Tokenizer | None, prompts
) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
      TypeError: Neither text nor ids, or text without a tokenizer.
      ValueError: No prompts, ids outside the vocabulary, or another vocabulary.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("no prompts; pass a text, texts or token ids of each prompt")
    texts = [isinstance(prompt, str) for prompt in prompts]
    if any(texts) and tokenizer is None:
        raise TypeError("text prompts need a tokenizer; without one pass token ids")
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab_size)
    return [_encode(model, tokenizer, p, i) for i, p in enumerate(prompts)]


def _encode(model: Model, tokenizer, prompt, number: int) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        kind = type(prompt).__name__
        raise TypeError(f"prompt {number} is a {kind}, expected a text or token ids")
    size = model.config.vocab_size
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise ValueError(f"prompt {number} has ids outside [0, {size})")
    return ids.tolist()


def check_stops(stop: str | Sequence[str], tokenizer: Tokenizer | None):
    """Stop strings as a tuple."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop string {text!r}, expected a non-empty string")
    if stops and tokenizer is None:
        raise TypeError("stop strings need a tokenizer")
    return stops


def end_ids(eos: int | Sequence[int] | None, tokenizer: Tokenizer | None):
    """Ids that end a text, int32 [n]; -1, which no token has, when there is none."""
    if eos is None:
        eos = getattr(tokenizer, "eos_id", None)
        eos = () if eos is None else eos
    eos = (eos,) if np.ndim(eos) == 0 else tuple(eos)
    return np.asarray(eos or (-1,), np.int32)


def check_lengths(
    model: Model, ids: list[list[int]], max_new_tokens: int, batch_size: int
) -> None:
    """ValueError for an empty or too long prompt, or nothing to generate."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    longest = model.config.max_length
    for number, row in enumerate(ids):
        if not row:
            raise ValueError(
                f"prompt {number} is empty and the tokenizer adds no BOS; "
                "expected at least one token"
            )
        if len(row) >= longest:
            raise ValueError(
                f"prompt {number} has {len(row)} tokens, expected at most "
                f"{longest - 1}: the model's maximum length is {longest}, new "
                "tokens included"
            )


def bucket(n: int, most: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96 ..., at most ``most``.

    >>> [bucket(n, 512) for n in (1, 17, 33, 65, 400)]
    [16, 24, 48, 96, 512]
    """
    power = max(SMALLEST_BUCKET, 2 ** math.ceil(math.log2(n)))
    middle = power * 3 // 4
    return min(middle if SMALLEST_BUCKET <= middle >= n else power, most)


def pad(model: Model, ids, max_new_tokens: int, seed: int, streams: Sequence[int]):
    """(prompts, cache slots) of one batch, in few distinct shapes.

    ``streams`` numbers the random stream of each row.
    """
    most = model.config.max_length
    rows = 2 ** math.ceil(math.log2(len(ids)))
    length = np.zeros(rows, np.int32)
    length[: len(ids)] = [len(row) for row in ids]
    limit = np.where(length > 0, np.minimum(length + max_new_tokens, most), 0)
    tokens = np.zeros((rows, bucket(max(length), most)), np.int32)
    for row, own in zip(tokens, ids, strict=False):
        row[: len(own)] = own
    stream = np.zeros(rows, np.uint32)
    stream[: len(ids)] = streams
    prompts = Prompts(tokens, length, limit.astype(np.int32), np.uint32(seed), stream)
    return prompts, bucket(max(limit), most)


@partial(jax.jit, static_argnames="slots")
def prefill(
    model: Model, prompts: Prompts, sampler: Sampler, ends, slots: int
) -> State:
    """Reads the prompts into a fresh cache of ``slots`` positions; one new token."""
    (batch, width), length = prompts.tokens.shape, prompts.length
    hidden, cache = _read_whole(model, prompts.tokens, length, slots)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    logits = model.config.head(model.params, jnp.take_along_axis(hidden, last, 1))
    tokens = jnp.zeros((batch, slots), jnp.int32).at[:, :width].set(prompts.tokens)
    blank = jnp.zeros(tokens.shape, jnp.float32)
    alive = length < prompts.limit
    key = jax.random.key(prompts.seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.streams)
    state = State(cache, tokens, blank, length, prompts.limit, alive, keys)
    return _choose(state, logits[:, 0], sampler, ends)


def _read_whole(model: Model, tokens, length, slots: int):
    """(last hidden states, a fresh cache) of the first ``length`` tokens of rows."""
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    order = jnp.broadcast_to(order, tokens.shape)
    return model.config.forward(
        model.params,
        tokens,
        positions=order,
        segments=(order < length[:, None]).astype(jnp.int32),
        cache=model.config.empty_cache(len(tokens), slots),
        hidden_only=True,
    )


def _read_again(model: Model, state: State) -> State:
    """The cache anew for rows that have just outgrown one of ``config.rereads``.

    As in transformers, whose Phi-3 drops the cache there.
    """
    slots, cache = state.tokens.shape[1], state.cache
    for most in model.config.rereads:
        if most + 1 >= slots:  # no row can go on beyond
            continue
        rows = state.alive & (state.length == most + 1)

        def renewed(cache, rows=rows, most=most):
            tokens, length = state.tokens[:, : most + 1], jnp.where(rows, most + 1, 0)
            fresh = _read_whole(model, tokens, length, slots)[1]
            mine = lambda x: rows.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
            return jax.tree.map(lambda a, b: jnp.where(mine(a), a, b), fresh, cache)

        cache = jax.lax.cond(rows.any(), renewed, lambda cache: cache, cache)
    return dataclasses.replace(state, cache=cache)


@partial(jax.jit, donate_argnames="state")
def advance(model: Model, state: State, sampler: Sampler, ends, steps) -> State:
    """Up to ``steps`` more tokens for every row that has not ended."""

    def unfinished(carry):
        step, state = carry
        return (step < steps) & state.alive.any()

    def step(carry):
        count, state = carry[0], _read_again(model, carry[1])
        at = jnp.maximum(state.length - 1, 0)[:, None]
        logits, cache = model(
            jnp.take_along_axis(state.tokens, at, 1),
            positions=at,
            segments=state.alive[:, None].astype(jnp.int32),
            cache=state.cache,
        )
        state = dataclasses.replace(state, cache=cache)
        return count + 1, _choose(state, logits[:, 0], sampler, ends)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _choose(state: State, logits, sampler: Sampler, ends) -> State:
    """Append one token to each living row; the draw depends on its position alone."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
    token = sampler(keys, logits)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
    row = jnp.arange(len(token))
    slot = jnp.where(state.alive, state.length, state.tokens.shape[1])
    length = state.length + state.alive
    over = (token[:, None] == ends).any(-1) | (length >= state.limit)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[row, slot].set(token, mode="drop"),
        logprobs=state.logprobs.at[row, slot].set(chosen, mode="drop"),
        length=length,
        alive=state.alive & ~over,
    )


def _run(model, tokenizer, state: State, ids, sampler, ends, stops) -> list[Generation]:
    """Advance until all rows have ended; look for stop strings now and then."""
    steps = STRIDE if stops else model.config.max_length
    while True:
        found = _read(tokenizer, state, ids, ends, stops)
        stopped = np.asarray([g.finish == "stop" for g in found])
        stopped = np.pad(stopped, (0, len(state.length) - len(ids)))
        state = dataclasses.replace(state, alive=state.alive & ~stopped)
        if not np.asarray(state.alive).any():
            return found
        state = advance(model, state, sampler, ends, np.int32(steps))


def _read(tokenizer, state: State, ids, ends, stops) -> list[Generation]:
    """The text of each row so far."""
    tokens, logprobs = np.asarray(state.tokens), np.asarray(state.logprobs)
    lengths = np.asarray(state.length)
    made = []
    for row, prompt in enumerate(ids):
        span = slice(len(prompt), lengths[row])
        one = _generation(tokenizer, prompt, tokens[row, span].tolist(), ends, stops)
        values = tuple(logprobs[row, span][: len(one.tokens)].tolist())
        made.append(dataclasses.replace(one, logprobs=values))
    return made


def _generation(tokenizer, prompt, new, ends, stops) -> Generation:
    """New tokens as text, cut at the first stop string."""
    finish = "eos" if new and new[-1] in ends else "length"
    kept = new[:-1] if finish == "eos" else new
    text = _text(tokenizer, prompt, kept)
    if any(stop in text for stop in stops):

        def stopped(count: int) -> bool:
            part = _text(tokenizer, prompt, kept[:count])
            return any(stop in part for stop in stops)

        new = kept[: bisect.bisect_left(range(len(kept)), True, key=stopped)]
        text, finish = _text(tokenizer, prompt, new), "stop"
        text = text[: min(text.index(s) for s in stops if s in text)]
    return Generation(text, tuple(new), finish, len(prompt))


def _text(tokenizer, prompt, new) -> str:
    """What ``new`` adds to the prompt's text (leading spaces depend on the prompt)."""
    if tokenizer is None:
        return ""
    before = tokenizer.decode(prompt)
    return tokenizer.decode([*prompt, *new])[len(before) :]
