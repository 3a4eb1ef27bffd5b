"""Evaluation: protocols against transcriptions, scores against enumeration."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import Letters

from jaxllm.core import weights
from jaxllm.core.formats import Integer
from jaxllm.core.model import put
from jaxllm.core.weights import Quantized
from jaxllm.data.corpora import documents, from_texts
from jaxllm.evaluate import perplexity, size
from jaxllm.evaluate.likelihood import negative_log_likelihood
from jaxllm.models import MLP, Attention, Layer, Transformer, init

LENGTH = 32
LOGITS = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def letters():
    return Letters()


@pytest.fixture(scope="module")
def tiny():
    """A random model with logits far from uniform."""
    layer = Layer(Attention(2, 1, 8), MLP(24))
    config = Transformer(
        130, 16, (layer, layer), tied=True, max_length=LENGTH, init_std=0.4
    )
    return init(config, jax.random.key(0))


def nats(model, ids):
    """Nats of each token but the first, with numpy from one row of logits."""
    padded = jnp.zeros((1, LENGTH), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    logits = np.asarray(LOGITS(model, padded)[0], np.float64)[: len(ids) - 1]
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return total - logits[np.arange(len(ids) - 1), np.asarray(ids)[1:]]


TEXTS = ["the cat sat", "a much longer document that does not fit into one", "I"]


def test_documents_are_predicted_after_bos_and_alone(tiny, letters):
    got = perplexity(tiny, letters, TEXTS, "documents")
    rows = [letters.encode(t)[:LENGTH] for t in TEXTS]
    want = np.concatenate([nats(tiny, ids) for ids in rows])
    assert got.tokens == got.bytes == len(want)
    assert got.nll == pytest.approx(want.mean(), rel=1e-5)
    assert got.words == 3 + 6 + 1  # the cut document ends inside its sixth word
    assert got.digest == from_texts(TEXTS).digest


def test_windows_do_not_overlap_and_drop_the_tail(tiny, letters):
    got = perplexity(tiny, letters, TEXTS, window=16)
    stream = letters.encode("\n\n".join(TEXTS))
    cut = [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]
    want = np.concatenate([nats(tiny, ids) for ids in cut])
    assert (got.tokens, got.nll) == (len(want), pytest.approx(want.mean(), rel=1e-5))
    assert "non-overlapping windows of 16 tokens" in got.protocol


@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 15), (8, 3), (32, 1)])
def test_strided_predicts_each_token_once_with_context(tiny, letters, window, stride):
    got = perplexity(tiny, letters, TEXTS, "strided", window=window, stride=stride)
    stream = letters.encode("\n\n".join(TEXTS))
    want = []
    for target in range(1, len(stream)):
        late = max(0, -(-(target + 1 - window) // stride)) * stride
        want.append(nats(tiny, stream[late : target + 1])[-1])
        assert late == 0 or target - late >= window - stride
    assert got.tokens == got.bytes == len(stream) - 1
    assert got.nll == pytest.approx(np.mean(want), rel=1e-5)


def test_all_normalisations_describe_one_total(tiny, letters):
    got = perplexity(tiny, letters, TEXTS, "documents")
    total = got.nll * got.tokens
    assert got.perplexity == pytest.approx(math.exp(got.nll))
    assert got.bits_per_byte * math.log(2) * got.bytes == pytest.approx(total)
    assert math.log(got.byte_perplexity) * got.bytes == pytest.approx(total)
    assert math.log(got.word_perplexity) * got.words == pytest.approx(total)
    for part in ("bits per byte", "per word", "per token", got.digest, got.protocol):
        assert part in str(got)


def test_batching_changes_nothing_and_compiles_once(tiny, letters):
    texts = [f"document number {i} " * (i % 3 + 1) for i in range(13)]
    one = perplexity(tiny, letters, texts, "documents", batch_size=1)
    before = negative_log_likelihood._cache_size()
    many = perplexity(tiny, letters, texts, "documents", batch_size=4)
    perplexity(tiny, letters, texts[:11], "documents", batch_size=4)
    assert negative_log_likelihood._cache_size() == before + 1
    assert (many.nll, many.tokens) == (pytest.approx(one.nll, rel=1e-6), one.tokens)


def test_tokens_without_a_tokenizer(tiny, letters):
    ids = [letters.encode(text) for text in TEXTS]
    given = perplexity(tiny, ids, protocol="documents")
    read = perplexity(tiny, letters, TEXTS, "documents")
    assert given.nll == read.nll
    assert given.bytes is given.bits_per_byte is given.word_perplexity is None
    flat = perplexity(tiny, np.arange(64) % 130)
    assert flat.tokens == 62 and "unknown bits per byte" in str(flat)


def test_limit_counts_windows_or_documents(tiny, letters):
    two = perplexity(tiny, letters, TEXTS, "documents", limit=2)
    assert two.nll == perplexity(tiny, letters, TEXTS[:2], "documents").nll
    assert perplexity(tiny, letters, TEXTS, window=16, limit=2).tokens == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(protocol="window"), "windows, strided, documents"),
        (dict(window=64), "expected 2 to 32"),
        (dict(protocol="documents", stride=4), "belongs to 'strided'"),
        (dict(protocol="strided", window=8, stride=8), "expected 1 to 7"),
        (dict(texts=["short"]), "6 tokens, fewer than the 32"),
        (dict(texts=[""]), "all documents are empty"),
        (dict(texts=None), "pass a corpus"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(limit=0), "limit is 0"),
        (dict(tokenizer=[1, 200], texts=None), r"outside \[0, 130\)"),
    ],
)
def test_bad_requests_are_refused(tiny, letters, change, says):
    arguments = dict(tokenizer=letters, texts=TEXTS) | change
    with pytest.raises(ValueError, match=says):
        perplexity(tiny, **arguments)


def test_stories_model_reaches_its_published_likelihood(
    stories, stories_tokenizer, shared_data
):
    corpus = documents(shared_data / "text/tinystories.txt", "eval")
    got = perplexity(stories, stories_tokenizer, corpus, "documents", limit=40)
    assert got.nll == pytest.approx(1.49, abs=0.05)  # 1.49 on all 1,738 stories


def test_size_is_what_is_stored(tiny):
    dense = size(tiny)
    assert dense.total == sum(x.nbytes for x in jax.tree.leaves(tiny.params))
    assert sum(dense.bytes.values()) == dense.total
    assert dense.bytes["attention"] == 2 * 4 * (16 * 16 * 2 + 16 * 8 * 2)
    assert dense.bytes["embeddings"] == 4 * 16 * 130
    assert dense.bytes["norms"] == 4 * 16 * 5
    assert (dense.bits_per_weight, dense.bits_per_parameter) == (32, 32)


def quantized(w, bits=4):
    """Rounded to ``bits`` with one float32 scale per output."""
    values = jnp.asarray(w).T
    scale = jnp.abs(values).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return Quantized.encode(values, scale, None, Integer(bits), None, "float32")


def test_size_of_a_compressed_layer_names_both_denominators(tiny):
    packed = quantized(tiny.params["layers"]["0"]["mlp"]["up"]["weight"])
    params = put(tiny.params, "layers.0.mlp.up.weight", packed)
    got = size(tiny.replace(params=params))
    assert got.compressed == 1
    assert got.linear_bytes == weights.nbytes(packed) == 24 * 8 + 24 * 4
    assert got.bits_per_weight == 8 * got.linear_bytes / (16 * 24)
    assert got.parameters == size(tiny).parameters
    assert got.total == size(tiny).total - 4 * 16 * 24 + got.linear_bytes


def test_size_works_on_shapes_alone(tiny):
    assert size(jax.eval_shape(lambda: tiny)) == size(tiny)
