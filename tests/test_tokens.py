"""Token rules: what they keep is computed exactly as if the rest had never been."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import close, compiled, make, quick, random_model

from jaxllm import methods
from jaxllm.core.compose import Context
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.model import get
from jaxllm.core.spec import decode, encode, expression
from jaxllm.core.streams import TokenRule, spans
from jaxllm.core.tokens import fewer_tokens, received_attention, start_attention
from jaxllm.generation import generate
from jaxllm.models import MLP, Attention, Layer, MoE, Norm
from jaxllm.models.attention import attend, visibility
from jaxllm.models.layers import Pass

LENGTH, VOCABULARY = 20, 61
ATTENTION = Attention(4, 2, 8)
LAYERS = {
    "dense": Layer(ATTENTION, MLP(40)),
    "experts": Layer(ATTENTION, MoE(4, 2, 24, shared=MLP(20))),
    "sandwich": Layer(ATTENTION, MLP(40), Norm(plus_one=True), post_norm=True),
    "parallel": Layer(ATTENTION, MLP(40), parallel=True),
}
DRAWN = np.random.default_rng(3).integers(0, VOCABULARY, (2, LENGTH))
TOKENS = jnp.asarray(DRAWN, jnp.int32)
SEGMENTS = jnp.asarray([[1] * 12 + [2] * 8, [1] * 15 + [0] * 5], jnp.int32)
# Positions count anew in each document, as packing makes them.
POSITIONS = jnp.asarray([[*range(12), *range(8)], [*range(20)]], jnp.int32)
INT4 = ActivationFormat(4)


def model_of(layer: str = "dense", count: int = 3):
    return random_model(make(LAYERS[layer], count))


def changed(model, **options):
    """The model with the rule in its middle layers."""
    return fewer_tokens(**({"first": 1} | options))(model, Context())


def logits(model, rows, positions=POSITIONS[1:], segments=None):
    """As a compiled program; positions count from the row's start."""
    positions = jnp.broadcast_to(positions[:, : rows.shape[1]], rows.shape)
    return compiled(model, rows, positions, segments)


def explicit(config, params, rows, positions, segments, path: str):
    """The probabilities [batch, heads, i, t] of a layer, with all tokens so far."""
    seen = []

    def spy(q, k, v, mask, *, scale, softcap):
        groups = q.shape[2] // k.shape[2]
        scores = jnp.einsum("bihd,bthd->bhit", q, jnp.repeat(k, groups, 2)) * scale
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1)
        seen.append(jnp.where(mask[:, None], weights, 0.0))
        return attend(q, k, v, mask, scale=scale, softcap=softcap)

    hidden = config.embed(params, rows, positions)
    for name, block in config.blocks():
        values = Pass(positions, segments, attend=spy)
        (hidden, *_), _ = block.apply(get(params, name), hidden, values)
        if name == path:
            return seen[-1]
    raise AssertionError(path)


@pytest.mark.parametrize("layer", LAYERS)
def test_keep_all_is_the_same_function(layer):
    model = model_of(layer)
    same = changed(model)
    assert same.config != model.config
    close(logits(same, TOKENS), logits(model, TOKENS), 1e-6)


def test_scores_are_those_of_the_explicit_probabilities():
    """start: p[i, first of the document]; received: the mean of a column."""
    model = model_of()
    p = np.asarray(
        explicit(model.config, model.params, TOKENS, POSITIONS, SEGMENTS, "layers.1")
    ).mean(1)
    start, end = map(np.asarray, spans(TOKENS.shape, SEGMENTS))
    seen = end - np.arange(LENGTH)
    want = {
        start_attention(): np.take_along_axis(p, start[..., None], 2)[..., 0],
        received_attention(): p.sum(1) / seen,
    }
    real = np.asarray(SEGMENTS) > 0
    for score, values in want.items():
        found = []

        @expression
        def spy(score=score, found=found):
            return lambda view: found.append(score(view)) or found[-1]

        changed(model, score=spy(), drop=0.3, last=2)(
            TOKENS, positions=POSITIONS, segments=SEGMENTS
        )
        close(np.asarray(found[0])[real], values[real], 1e-5)


def test_what_stays_is_computed_as_if_the_rest_had_never_been():
    """Layers behind the rule, run by hand on the tokens of most start attention."""
    model = model_of()
    drop, count = 0.4, int(0.4 * LENGTH)
    config, params = model.config, model.params
    positions = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
    p = explicit(config, params, TOKENS, positions, None, "layers.1")
    score = np.array(p[..., 0].mean(1))
    score[:, [0, -1]] = np.inf
    kept = np.sort(np.argsort(-score, 1, kind="stable")[:, : LENGTH - count], 1)
    one, mid, last = (block for _, block in config.blocks())
    hidden = config.embed(params, TOKENS, positions)
    hidden = one.run(get(params, "layers.0"), hidden, positions, None, None)[0]
    half = dataclasses.replace(mid, config=dataclasses.replace(mid.config, ffn=None))
    part = {k: v for k, v in get(params, "layers.1").items() if "mlp" not in k}
    attended = half.run(part, hidden, positions, None, None)[0]
    rest = dataclasses.replace(
        mid, config=dataclasses.replace(mid.config, attention=None)
    )
    part = {k: v for k, v in get(params, "layers.1").items() if "attn" not in k}
    take = lambda a: jnp.stack([x[k] for x, k in zip(a, kept, strict=True)])  # noqa: E731
    short, where = take(attended), take(positions)
    short = rest.run(part, short, where, None, None)[0]
    short = last.run(get(params, "layers.2"), short, where, None, None)[0]
    whole = attended.at[jnp.arange(2)[:, None], kept].set(short)
    want = config.head(params, whole)
    made = changed(model, drop=drop, last=2)
    close(logits(made, TOKENS), want)
    for options in (dict(scan=True), dict(remat=True)):
        run = quick(functools.partial(made.config.forward, **options))
        close(run(params, TOKENS), want)


def test_later_layers_really_see_fewer_tokens():
    made = changed(model_of(), drop=0.25, last=2)
    text = str(jax.make_jaxpr(lambda t: made(t))(TOKENS))
    assert f"f32[2,{LENGTH - LENGTH // 4},40]" in text  # hidden channels of the MLPs
    assert text.count(f"f32[2,{LENGTH},40]") < text.count("f32[2,15,40]")


@pytest.mark.parametrize("layer", ("dense", "parallel"))
def test_documents_and_padding_do_not_matter_to_each_other(layer):
    """A document's logits are the same alone, packed and padded."""
    made = changed(model_of(layer), drop=0.3, lower=0.3, format=INT4)
    packed = logits(made, TOKENS, POSITIONS, SEGMENTS)
    for row, start, end in ((0, 0, 12), (0, 12, 20), (1, 0, 15)):
        alone = logits(made, TOKENS[row : row + 1, start:end])
        close(packed[row, start:end], alone[0])


def test_low_tokens_are_rounded_and_stay_low():
    """Lower shares of one layer hold in the layers behind; the ends stay exact."""
    low = jnp.zeros(TOKENS.shape, bool).at[:, 3].set(True)
    rule = TokenRule(start_attention(), 0.0, 0.5, INT4)
    mix = lambda values: jnp.cumsum(values, 1) / 20 + jnp.arange(20.0)[None]  # noqa: E731
    chosen = rule.choose(mix, None, low).low
    assert chosen.sum(1).tolist() == [10 + int(not 0 < 3 <= 10)] * 2
    assert not chosen[:, 0].any() and not chosen[:, -1].any() and chosen[:, 3].all()
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))
    rounded = rule.lowered(x, chosen)
    np.testing.assert_array_equal(
        rounded, np.where(chosen[..., None], INT4.round(x), x)
    )
    one = changed(model_of(), lower=0.5, format=INT4, last=2).config
    assert one.layers[0].tokens is None
    assert one.layers[1].tokens.lower == 0.5 and one.layers[2].tokens.lower == 0
    assert one.layers[2].tokens.format == INT4


def test_the_cache_of_later_layers_holds_what_stayed():
    """A prompt, then single steps: as a mask over the dropped tokens would give."""
    model = model_of()
    made = changed(model, drop=0.4, last=2)
    prompt, more = TOKENS[:, :14], TOKENS[:, 14:]
    cache = made.config.empty_cache(2, LENGTH)
    _, cache = made(prompt, cache=cache)
    dropped = int(0.4 * 14)
    assert cache["layers.1"].skipped.tolist() == [0, 0]
    assert cache["layers.2"].skipped.tolist() == [dropped] * 2
    kept = _kept(made, prompt)
    step = quick(lambda rows, at, cache: made(rows, positions=at, cache=cache))
    want = _masked(model, TOKENS, kept)
    for i in range(more.shape[1]):
        at = jnp.full((2, 1), 14 + i, jnp.int32)
        found, cache = step(more[:, i : i + 1], at, cache)
        close(found[:, 0], want[:, 14 + i])
    filled = np.abs(np.asarray(cache["layers.2"].keys)).sum((2, 3)) > 0
    assert filled.sum(1).tolist() == [LENGTH - dropped] * 2


def _kept(made, prompt):
    """Which tokens of a prompt the second layer keeps [batch, length]."""
    found = []
    rule = made.config.layers[1].tokens
    choose = type(rule).choose
    spy = lambda *a: found.append(choose(*a)) or found[-1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rule), "choose", spy)
        made(prompt)
    return next(np.asarray(c.stays) for c in found if c.stays is not None)


def _masked(model, rows, kept):
    """The dense model where layers behind the second do not see dropped tokens."""
    seen = np.ones(rows.shape, bool)
    seen[:, : kept.shape[1]] = kept
    calls = []

    def masked(q, k, v, mask, **options):
        calls.append(1)
        mask = mask & (seen[:, None, :] | (len(calls) < 3))
        return attend(q, k, v, mask, **options)

    return model.config.forward(model.params, rows, attend=masked)


def test_generation_does_not_depend_on_the_batch():
    """Prompts of several lengths, padded together, continue as each does alone."""
    made = changed(model_of(), drop=0.5, last=2)
    prompts = [DRAWN[0, :n].tolist() for n in (18, 9, 5)]
    together = generate(made, None, prompts, 8, eos=())
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generate(made, None, [prompt], 8, eos=())
        assert found.tokens == alone.tokens


def test_calibration_sees_all_tokens():
    model = model_of()
    made = changed(model, drop=0.5, lower=0.5, format=INT4)
    hidden = model.config.embed(model.params, TOKENS, POSITIONS)
    for (path, plain), (_, ruled) in zip(
        model.config.blocks(), made.config.blocks(), strict=True
    ):
        run = functools.partial(plain.run, get(model.params, path), hidden)
        other = functools.partial(ruled.run, get(model.params, path), hidden)
        close(run(POSITIONS, None, None)[0], other(POSITIONS, None, None)[0], 1e-7)


def test_visibility_with_a_cache_counts_slots():
    made = changed(model_of(), drop=0.4, last=2)
    _, cache = made(TOKENS[:, :14], cache=made.config.empty_cache(2, LENGTH))
    at = jnp.full((2, 1), 14, jnp.int32)
    mask = visibility(Pass(at, cache=cache["layers.2"]), None)
    assert mask.sum(-1).tolist() == [[15 - int(0.4 * 14)]] * 2


def test_the_rule_travels_with_the_configuration():
    """Through JSON, as a checkpoint's manifest has it."""
    config = changed(model_of(), drop=0.25, lower=0.25, format=INT4).config
    assert decode(json.loads(json.dumps(encode(config))), methods.find) == config


def test_refusals():
    for options in (dict(drop=1.0), dict(lower=-0.1), dict(drop=0.6, lower=0.6)):
        with pytest.raises(ValueError, match=r"accepted|exceed"):
            fewer_tokens(format=INT4, **options)
    with pytest.raises(ValueError, match="without a format"):
        fewer_tokens(lower=0.5)
    with pytest.raises(ValueError, match="no layer is chosen"):
        changed(model_of(), drop=0.1, first=5)
    rule = TokenRule(start_attention(), 0.1)
    with pytest.raises(ValueError, match="without attention"):
        Layer(None, MLP(40), tokens=rule)
    headless = make(Layer(None, MLP(40)))
    assert headless.with_tokens({"layers.1": rule}) == headless
