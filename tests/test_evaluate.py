"""Evaluation: protocols against transcriptions, scores against enumeration."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import Letters

from jaxllm.core import weights
from jaxllm.core.formats import Integer
from jaxllm.core.model import History, get, put
from jaxllm.core.weights import Quantized
from jaxllm.data.corpora import documents, from_texts
from jaxllm.evaluate import (
    cache_bytes_per_token,
    compare,
    disk_bytes,
    energy,
    likelihood,
    perplexity,
    report,
    size,
    speed,
    speed_up,
)
from jaxllm.evaluate.report import Report
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
    before = likelihood._scores._cache_size()
    many = perplexity(tiny, letters, texts, "documents", batch_size=4)
    perplexity(tiny, letters, texts[:11], "documents", batch_size=4)
    assert likelihood._scores._cache_size() == before + 1
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
    assert got.nll == pytest.approx(1.467, abs=0.05)  # 1.467 on all 1,738 stories


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


@pytest.fixture(scope="module")
def timed(tiny):
    return speed(tiny, prompt_tokens=16, new_tokens=8, repeats=3)


def test_speed_reports_what_the_programs_say(tiny, timed):
    assert timed.prefill > 0 and timed.decode > 0 and timed.spread >= 0
    linear = size(tiny).linear_weights + 16 * 130 / 16  # the head runs once a prompt
    assert 2 * linear < timed.flops_per_token < 4 * linear
    assert timed.peak_bytes["program"] > size(tiny).total
    assert timed.peak_bytes["process"] > timed.peak_bytes["program"]
    assert "prefill" in str(timed) and timed.device in str(timed)


def test_cache_bytes_are_those_of_keys_and_values(tiny):
    assert cache_bytes_per_token(tiny) == 2 * (2 * 1 * 8 * 4)


@pytest.mark.parametrize(
    ("factor", "spread", "says"),
    [
        (1.5, 0.1, "speed-up: prefill 1.00x, decode 1.50x"),
        (1.04, 0.0, "no speed-up here (prefill 1.00x, decode 1.04x)"),
        (1.5, 0.6, "no speed-up here (prefill 1.00x, decode 1.50x)"),
        (0.5, 0.0, "no speed-up here (prefill 1.00x, decode 0.50x)"),
    ],
)
def test_a_speed_up_must_exceed_the_noise(timed, factor, spread, says):
    before = dataclasses.replace(timed, spread=0.0)
    after = dataclasses.replace(before, decode=before.decode * factor, spread=spread)
    assert speed_up(before, after) == says


def test_bad_workloads_are_refused(tiny):
    with pytest.raises(ValueError, match="at most 32 tokens in a row"):
        speed(tiny, prompt_tokens=30, new_tokens=8)
    with pytest.raises(ValueError, match="at least 1, 1, 2, 1"):
        speed(tiny, new_tokens=1)


def test_disk_bytes_are_those_of_the_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"12345")
    (tmp_path / "y").write_bytes(b"123")
    assert disk_bytes(tmp_path) == 8 and disk_bytes(tmp_path / "y") == 3
    with pytest.raises(FileNotFoundError, match="cannot measure"):
        disk_bytes(tmp_path / "z")


def test_energy_of_a_meter_that_wraps_around(tmp_path):
    counters = [tmp_path / f"intel-rapl:{i}" for i in range(2)]
    for folder in (*counters, tmp_path / "intel-rapl:0:0"):
        folder.mkdir()
        (folder / "energy_uj").write_text("900")
        (folder / "max_energy_range_uj").write_text("1000")

    def run():
        (counters[0] / "energy_uj").write_text("950")
        (counters[1] / "energy_uj").write_text("100")

    got = energy.measure(run, tmp_path)
    assert got.joules == pytest.approx((50 + 200) / 1e6) and "RAPL" in got.source


def test_without_a_meter_the_reason_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    ran = []
    got = energy.measure(lambda: ran.append(1), tmp_path)
    assert got.joules is got.per(3) is None
    assert "no meter" in got.source and ran == [1]


def packed_model(tiny, bits):
    model = tiny
    for path in tiny.config.linears():
        w = quantized(get(tiny.params, f"{path}.weight"), bits)
        model = model.replace(params=put(model.params, f"{path}.weight", w))
    return model.replace(history=History((*tiny.history.specs, f"rtn(bits={bits})")))


@pytest.fixture(scope="module")
def made(tiny, letters):
    models = [packed_model(tiny, bits) for bits in (8, 2)]
    settings = dict(tokenizer=letters, protocol="documents", speed=False)
    return report(tiny, models, TEXTS, seconds=[1.5, None], seed=7, **settings)


def test_report_measures_every_step(made, tiny, letters):
    dense, eight, two = made.data["steps"]
    assert dense["name"] == "dense" and eight["name"] == "'rtn(bits=8)'"
    assert dense["size"] == size(tiny).to_json()
    nats = perplexity(tiny, letters, TEXTS, "documents")
    assert dense["perplexity"] == {"texts": nats.to_json()}
    assert two["size"]["total"] < eight["size"]["total"] < dense["size"]["total"]
    assert (dense["seconds"], eight["seconds"]) == (None, 1.5)
    page = str(made)
    for part in (f"{nats.perplexity:.4f}", nats.protocol, nats.digest, "jaxlib"):
        assert part in page
    assert made._repr_markdown_() == made.to_markdown() == page


def test_a_report_is_written_whole_and_read_again(made, tmp_path, monkeypatch):
    folder = made.write(tmp_path / "x")
    assert sorted(p.name for p in folder.iterdir()) == [
        "report.json",
        "report.md",
        "report.png",
    ]
    assert Report.load(folder) == made
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")

    def broken(points, path):
        raise OSError("disk full")

    monkeypatch.setitem(Report.write.__globals__, "scatter", broken)
    with pytest.raises(OSError, match="disk full"):
        made.write(tmp_path / "y")
    assert list((tmp_path / "y").iterdir()) == []


def test_names_show_what_a_step_added(tiny, letters):
    one = packed_model(tiny, 8)
    two = one.replace(history=one.history + "next()")
    settings = dict(tokenizer=letters, protocol="documents", speed=False)
    names = [
        s["name"] for s in report(tiny, [one, two], TEXTS, **settings).data["steps"]
    ]
    assert names == ["dense", "'rtn(bits=8)'", "+ 'next()'"]


def test_comparison_marks_the_pareto_front(made, tmp_path):
    worse = json.loads(json.dumps(made.data))
    for step in worse["steps"]:
        step["perplexity"]["texts"]["perplexity"] += 1
    got = compare(made, Report(worse | {"name": "worse"}))
    best = {(p.run, p.name) for p, b in zip(got.points, got.best, strict=True) if b}
    assert best == {
        (p.run, p.name)
        for p in made.points
        if all(p.perplexity < q.perplexity for q in made.points if q.bytes < p.bytes)
    }
    folder = got.write(tmp_path)
    assert json.loads((folder / "compare.json").read_text()) == got.to_json()


def test_other_protocols_are_not_compared(made, tiny, letters):
    other = report(tiny, [], TEXTS, tokenizer=letters, window=16, speed=False)
    with pytest.raises(ValueError, match=r"different things: .*documents.*windows"):
        compare(made, other)
    with pytest.raises(ValueError, match="no reports"):
        compare()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(seconds=[1, 2]), ValueError, "2 seconds for 1 models"),
        (dict(folders=["missing"]), FileNotFoundError, "missing"),
        (dict(tokenizer=None), ValueError, "pass tokenizer="),
        (dict(protocol="x"), ValueError, "expected one of windows"),
    ],
)
def test_bad_reports_are_refused(tiny, letters, change, error, says):
    arguments = dict(tokenizer=letters, speed=False) | change
    with pytest.raises(error, match=says):
        report(tiny, tiny, TEXTS, **arguments)
