"""Generation: against an uncached loop, golden text, and exact distributions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import Letters
from scipy import stats

from jaxllm.generation import Sampler, generate, loop
from jaxllm.models import MLP, Attention, Layer, Norm, Rope, Transformer, init
from jaxllm.models.config import RopeScaling

LENGTH = 48
LOGITS = jax.jit(lambda model, tokens, real: model(tokens, segments=real))
DRAW = jax.jit(lambda sampler, keys, logits: sampler(keys, logits))
LONGROPE = RopeScaling(
    "longrope",
    original_length=12,
    short=(1.0, 1.1, 1.2, 1.3),
    long=(1.5, 4.0, 9.0, 16.0),
)
LAYERS = {
    "llama": Layer(Attention(2, 1, 8), MLP(24)),
    "windowed": Layer(Attention(2, 2, 8, window=5, qk_norm=Norm()), MLP(24)),
    "learned positions": Layer(
        Attention(2, 2, 8, rope=None), MLP(24, "gelu", gated=False), Norm("layer")
    ),
    "longrope": Layer(Attention(2, 1, 8, rope=Rope(scaling=LONGROPE)), MLP(24)),
}


def model_of(kind):
    layers = (LAYERS[kind],)
    positions = LENGTH if kind == "learned positions" else 0
    config = Transformer(
        130, 16, layers, tied=True, max_length=LENGTH, init_std=0.5, positions=positions
    )
    return init(config, jax.random.key(3))


@pytest.fixture(scope="module")
def tiny():
    return model_of("llama")


@pytest.fixture(scope="module")
def letters():
    return Letters()


def greedy(model, ids, count, eos=129):
    """The likeliest continuation, one uncached forward pass per token."""
    ids, start = list(ids), len(ids)
    most = min(start + count, LENGTH)
    while len(ids) < most and (len(ids) == start or ids[-1] != eos):
        padded = jnp.zeros((1, LENGTH), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        real = (jnp.arange(LENGTH)[None] < len(ids)).astype(jnp.int32)
        ids.append(int(LOGITS(model, padded, real)[0, len(ids) - 1].argmax()))
    return tuple(ids[start:])


RAGGED = ["a", "the quick brown fox", "", "xyz", "once upon"]


@pytest.mark.parametrize("kind", LAYERS)
def test_greedy_equals_an_uncached_loop_for_ragged_prompts(kind, letters):
    model = model_of(kind)
    for got, text in zip(generate(model, letters, RAGGED, 20), RAGGED, strict=True):
        want = greedy(model, letters.encode(text), 20)
        assert got.tokens == want
        assert got.finish == ("eos" if want[-1] == 129 else "length")
        assert got.text == letters.decode(want)


def test_a_row_does_not_depend_on_its_batch(tiny, letters):
    settings = dict(max_new_tokens=20, batch_size=4)
    together = generate(tiny, letters, RAGGED, **settings)
    alone = [generate(tiny, letters, text, **settings)[0] for text in RAGGED[:3]]
    assert together[:3] == alone
    drawn = generate(tiny, letters, RAGGED, temperature=1.0, seed=5, **settings)
    others = [RAGGED[0], "?", "and", "something else", RAGGED[4]]
    again = generate(tiny, letters, others, temperature=1.0, seed=5, **settings)
    assert (again[0], again[4]) == (drawn[0], drawn[4])
    other_seed = generate(tiny, letters, RAGGED, temperature=1.0, seed=6, **settings)
    assert other_seed != drawn


def test_golden_text_of_the_stories_model(stories, stories_tokenizer, shared_data):
    page = (shared_data / "models/stories260K/stories260K.md").read_text()
    golden = page.split("-t 0.0\n")[1].split("\n```")[0]
    (got,) = generate(stories, stories_tokenizer, "", 256)
    assert got.text == golden


def test_one_compilation_serves_all_steps_and_settings(tiny, letters):
    generate(tiny, letters, "abc", 8, temperature=0.5, top_k=3)
    before = loop.prefill._cache_size(), loop.advance._cache_size()
    generate(tiny, letters, "a", 12, temperature=0.9, top_k=7, stop="q")
    generate(tiny, letters, "abcdef", 3, temperature=2.0, top_p=0.3, seed=9)
    assert (loop.prefill._cache_size(), loop.advance._cache_size()) == before


def test_the_last_position_of_the_model_is_used(tiny, letters):
    prompt = "x" * (LENGTH - 4)
    (got,) = generate(tiny, letters, prompt, 50, eos=())
    assert len(got.tokens) == 3 and got.finish == "length"
    assert got.tokens == greedy(tiny, letters.encode(prompt), 50, eos=None)


def test_eos_ends_a_row_and_leaves_no_text(tiny, letters):
    (free,) = generate(tiny, letters, "abc", 12, eos=())
    last = free.tokens[6]
    first = free.tokens.index(last)
    (got,) = generate(tiny, letters, "abc", 12, eos=[last, 129])
    assert (got.finish, got.tokens) == ("eos", free.tokens[: first + 1])
    assert got.text == letters.decode(free.tokens[:first])


@pytest.mark.parametrize(("start", "size"), [(0, 1), (3, 2), (17, 4), (30, 1)])
def test_stop_strings_are_found_across_tokens(tiny, letters, start, size):
    (free,) = generate(tiny, letters, "hello", 40, temperature=1.5, eos=())
    text = free.text
    stop = text[start : start + size]
    settings = dict(temperature=1.5, eos=(), stop=(stop, "never\n\n"))
    (got,) = generate(tiny, letters, "hello", 40, **settings)
    assert got.finish == "stop"
    assert got.text == text[: text.index(stop)]
    assert letters.decode(got.tokens).endswith(stop)
    assert got.tokens == free.tokens[: len(got.tokens)]


def test_logprobs_are_those_of_the_model(tiny, letters):
    settings = dict(temperature=0.7, top_k=5, logprobs=True, eos=())
    (got,) = generate(tiny, letters, "hello", 10, **settings)
    ids = [*letters.encode("hello"), *got.tokens]
    logits = tiny(jnp.asarray(ids)[None])[0]
    want = jax.nn.log_softmax(logits)[np.arange(5, 15), np.asarray(ids)[6:]]
    np.testing.assert_allclose(got.logprobs, want, atol=1e-4)
    (silent,) = generate(tiny, letters, "hello", 2)
    assert silent.logprobs is None


class Few(Letters):
    """Letters up to "r", so that the model has rows without a token."""

    vocab_size, bos_id, eos_id = 115, 113, 114


def test_rows_beyond_the_tokenizer_are_never_chosen(tiny):
    """And log-probabilities stay those of the model, with all its rows."""
    for settings in (dict(), dict(temperature=2.0), dict(temperature=2.0, top_k=128)):
        found = generate(tiny, Few(), ["abc"] * 8, 20, **settings, logprobs=True)
        ids = [i for one in found for i in one.tokens]
        assert max(ids) < 115
    logits = tiny(jnp.asarray([Few().encode("abc")]))[0, -1]
    want = jax.nn.log_softmax(logits)[found[0].tokens[0]]
    np.testing.assert_allclose(found[0].logprobs[0], want, atol=1e-4)
    free = generate(tiny, None, [Few().encode("abc")] * 8, 20, temperature=2.0)
    assert max(i for one in free for i in one.tokens) >= 115


def wanted(logits, temperature, top_k, top_p):
    """The distribution by its definition, token by token."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    share, kept, mass = p[order] / p[order].sum(), [], 0.0
    for index, s in zip(order, share, strict=True):
        kept.append(index)
        mass += s
        if mass >= (top_p or 1.0):
            break
    final = np.zeros_like(p)
    final[kept] = p[kept] / p[kept].sum()
    return final


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, None, None), (0.6, None, None), (1.5, 4, None), (1, None, 0.7), (1.3, 6, 0.8)],
)
def test_draws_have_exactly_the_stated_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 1.5, 12)
    p = wanted(logits, temperature, top_k, top_p)
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    sampler = Sampler.of(temperature, top_k, top_p)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 12))
    counts = np.bincount(DRAW(sampler, keys, rows), minlength=12)
    assert counts[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        assert stats.chisquare(counts[p > 0], draws * p[p > 0]).pvalue > 1e-3


def test_the_loop_draws_from_the_model(tiny):
    """Second tokens given the first, over many rows of one prompt."""
    rows = 512
    settings = dict(temperature=1.0, top_k=3, batch_size=512)
    got = generate(tiny, None, [[5]] * rows, 2, **settings)
    firsts, seconds = np.asarray([g.tokens for g in got]).T
    first = np.bincount(firsts).argmax()
    logits = np.asarray(tiny(jnp.asarray([[5, first]]))[0], np.float64)
    for drawn, row in ((firsts, logits[0]), (seconds[firsts == first], logits[1])):
        p = wanted(row, 1.0, 3, None)
        counts = np.bincount(drawn, minlength=130)
        assert counts[p == 0].sum() == 0
        assert stats.chisquare(counts[p > 0], len(drawn) * p[p > 0]).pvalue > 1e-3


def test_equal_logits_at_the_limit_keep_exactly_k():
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = DRAW(Sampler.of(1.0, top_k=3), keys, jnp.zeros((500, 10)))
    assert set(np.asarray(drawn).tolist()) == {0, 1, 2}


class NoBos(Letters):
    bos_id = None

    def encode(self, text, bos=True, eos=False):
        return super().encode(text, False, eos)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(max_new_tokens=0), ValueError, "max_new_tokens is 0, expected 1"),
        (dict(temperature=-0.1), ValueError, "expected 0 .greedy. or a number"),
        (dict(temperature=float("nan")), ValueError, "temperature is nan"),
        (dict(top_p=0.0), ValueError, r"top_p is 0.0, expected a number in \(0, 1\]"),
        (dict(top_p=1.1), ValueError, r"\(0, 1\]"),
        (dict(top_k=0), ValueError, "top_k is 0, expected 1 or more"),
        (dict(prompts=["x" * 47]), ValueError, "prompt 0 has 48 tokens, .* at most 47"),
        (dict(tokenizer=NoBos(), prompts=["a", ""]), ValueError, "prompt 1 is empty"),
        (dict(tokenizer=None), TypeError, "need a tokenizer"),
        (dict(tokenizer=None, prompts=[[1]], stop="x"), TypeError, "stop strings need"),
        (dict(prompts=[[1, 130]]), ValueError, r"outside \[0, 130\)"),
        (dict(prompts=[3.5]), TypeError, "prompt 0 is a float"),
        (dict(prompts=[]), ValueError, "no prompts"),
        (dict(stop=("",)), ValueError, "non-empty string"),
        (dict(batch_size=0), ValueError, "batch_size is 0"),
    ],
)
def test_bad_requests_are_refused(tiny, letters, change, error, says):
    arguments = dict(tokenizer=letters, prompts=["a"]) | change
    with pytest.raises(error, match=says):
        generate(tiny, **arguments)
