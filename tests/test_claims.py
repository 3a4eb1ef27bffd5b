"""Each card's claims, measured: better than the baseline at no fewer bytes."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import methods
from jaxllm.evaluate.ground import NAMES, Ground, ground

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "experiments" / "weights" / "results.json"
# The first claims of these cards, a few of each kind, are measured in every run of the
# tests, the others when slow tests run; all are checked against the leaderboard.
USUAL = {"gptq", "smoothquant", "sparsegpt", "svd_llm", "slicegpt", "wina"}


def claims(slow: bool = True):
    """(claim, whether the whole model's bytes count) of all cards."""
    for entry in methods.entries().values():
        for i, claim in enumerate(entry.card.claims):
            unusual = slow and (i or entry.name not in USUAL)
            yield pytest.param(
                claim,
                entry.family == "structure",
                id=f"{claim.spec} < {claim.over} on {claim.model}",
                marks=pytest.mark.slow if unusual else (),
            )


@pytest.fixture(scope="module")
def bench(request):
    """A function (model name, spec) -> (nats, bytes of linears, of all), cached."""

    @functools.cache
    def place(name: str) -> Ground:
        data = None if name == "builtin" else request.getfixturevalue("shared_data")
        return ground(name, data)

    @functools.cache
    def measure(name: str, spec: str):
        found = place(name)
        small = found.model
        if spec:
            small = methods.parse(spec)(small, found.calibration)
        return found.perplexity(small).nll, *found.bytes(small)

    measure.ground = place
    return measure


@pytest.mark.parametrize("claim, whole", list(claims()))
def test_claim(claim, whole, bench):
    """Sizes are those of the linears, and of all where the embedding changes too."""
    ours, *size = bench(claim.model, claim.spec)
    theirs, *theirs_size = bench(claim.model, claim.over)
    assert theirs_size[whole] >= size[whole], (
        "the baseline must have at least as many bytes"
    )
    assert ours < theirs * (1 - claim.margin), (ours, theirs)


@functools.cache
def measured() -> dict[tuple[str, str], dict]:
    """The rows of the committed leaderboard by model and spec."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return {(row["model"], row["spec"]): row for row in rows}


@pytest.mark.parametrize("claim, whole", list(claims(slow=False)))
def test_the_leaderboard_shows_the_claim(claim, whole):
    spelled = experiment("settings").canonical
    specs = (spelled(spec) for spec in (claim.spec, claim.over))
    ours, theirs = (measured()[claim.model, spec] for spec in specs)
    size = "all_bytes" if whole else "bytes"
    assert theirs[size] >= ours[size]
    assert ours["nll"] < theirs["nll"] * (1 - claim.margin)


def test_the_twin_is_the_same_function_with_outliers(bench):
    """Equal logits, but plain W8A8 hurts it, as it hurts large models."""
    plain_one, twin = bench.ground("stories"), bench.ground("twin")
    tokens = next(iter(plain_one.calibration)).tokens
    before, after = plain_one.model(tokens), twin.model(tokens)
    assert jnp.abs(before - after).max() < 2e-4 * jnp.abs(before).max()
    plain = "smoothquant(None, bits=8)"
    hurt = lambda name: bench(name, plain)[0] - bench(name, "")[0]  # noqa: E731
    assert hurt("twin") > 5 * max(hurt("stories"), 1e-3)


def test_int8_is_nearly_free_and_fewer_bits_cost_more(bench):
    base = bench("stories", "")[0]
    losses = [
        bench("stories", f"rtn({bits}, group_size=None)")[0] for bits in (8, 4, 3, 2)
    ]
    assert losses[0] - base < 0.01
    assert losses == sorted(losses)


def numpy_gptq(w, h, bits: int, group: int, damping: float):
    """The algorithm of the paper, transcribed: float64, one column at a time.

    ``w`` [out, in], ``h`` = E[x xT]; asymmetric grid per group, scales in bfloat16.
    """
    import ml_dtypes

    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    count = len(h)
    h[np.diag_indices(count)] += damping * np.mean(np.diag(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    quantized = np.zeros_like(w)
    for i in range(count):
        if i % group == 0:
            block = w[:, i : i + group]
            low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
            scale = (high - low) / (2**bits - 1)
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
        code = np.clip(np.round(w[:, i] / scale + zero), 0, 2**bits - 1)
        quantized[:, i] = (code - zero) * scale
        error = (w[:, i] - quantized[:, i]) / upper[i, i]
        w[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
    return quantized


def test_gptq_equals_an_independent_transcription(bench):
    """Perplexity within 1 %, and layer by layer the same output error."""
    from jaxllm.core.compose import compress, transform
    from jaxllm.core.metrics import gram
    from jaxllm.core.spec import expression

    @expression(needs=("gram",))
    def reference():
        def solve(w, stats, key, support):
            def run(w, h):
                found = numpy_gptq(np.asarray(w).T, np.asarray(h), 3, 32, 0.01)
                return found.T.astype(np.float32)

            shape = jax.ShapeDtypeStruct(w.shape, jnp.float32)
            return jax.pure_callback(run, shape, w, stats.gram.mean)

        return solve

    @transform
    def numpy_reference():
        return compress(reference())

    place = bench.ground("stories")
    found = place.perplexity(numpy_reference()(place.model, place.calibration))
    ours = bench("stories", "gptq(bits=3, group_size=32)")[0]
    assert abs(np.exp(ours) / np.exp(found.nll) - 1) < 0.01
    assert gram(0.01).needs == ("gram",)


@functools.cache
def experiment(name: str):
    """A module of experiments/weights, which is no package."""
    path = REPOSITORY / "experiments" / "weights" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"weights_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_leaderboard_has_every_weight_method_and_every_claim():
    settings = experiment("settings")
    planned = list(settings.plan(NAMES))
    assert len(set(planned)) == len(planned)
    named = {re.match(r"\w+", spec)[0] for _, spec in planned if spec}
    assert USUAL <= settings.entries().keys() <= named
    for entry in settings.entries().values():
        for claim in entry.card.claims:
            for spec in (claim.spec, claim.over):
                assert (claim.model, settings.canonical(spec)) in planned


def test_a_row_is_stale_when_source_behind_it_changes(monkeypatch):
    """The card and other methods' modules do not count."""
    sources = experiment("sources")
    before = {spec: sources.digest(spec) for spec in ("gptq()", "gptq(3)", "flap()")}
    assert before["gptq()"] == before["gptq(3)"] != before["flap()"]
    assert "Claim(" not in sources._code("jaxllm.methods.quantize.gptq")
    code = sources._code
    changed = lambda m: code(m) + "\n1" * (m == "jaxllm.core.sweep")  # noqa: E731
    monkeypatch.setattr(sources, "_code", changed)
    assert sources.digest("gptq()") != before["gptq()"]
    assert sources.digest("flap()") == before["flap()"]
