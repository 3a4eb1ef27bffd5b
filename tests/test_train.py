"""Training: the loop's laws, on models of a few thousand parameters."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from jaxllm import methods
from jaxllm.core import weights
from jaxllm.core.batch import Batch, targets
from jaxllm.core.model import Model, combine, weight, with_weight
from jaxllm.data.corpora import from_texts, join_documents
from jaxllm.data.loader import Batches, batches
from jaxllm.data.packing import pack_rows
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.models import Policy, init
from jaxllm.train.config import TrainConfig, Uniform, train_config
from jaxllm.train.curriculum import ShortFirst
from jaxllm.train.loop import fit
from jaxllm.train.losses import next_token
from jaxllm.train.optimizers import OPTIMIZERS, optimizer
from jaxllm.train.schedules import SCHEDULES, schedule
from jaxllm.train.state import Guard, initial_state, split_model
from jaxllm.train.step import SpikeRule, make_evaluation, make_step
from jaxllm.train.tasks import adapters, newest_model, run_training

SHAPE = dict(width=32, layers=1, heads=2, kv_heads=1, head_dim=16, hidden=48)
VOCABULARY = 40
KEY = jax.random.key(0)


def fresh(vocabulary: int) -> Model:
    config = Uniform(**SHAPE, max_length=32).build(vocabulary)
    return jax.jit(lambda key: init(config, key))(KEY)


@pytest.fixture(scope="module")
def model() -> Model:
    return fresh(VOCABULARY)


@pytest.fixture(scope="module")
def data() -> Batches:
    """Documents that count up from a random start, packed, the last row padded."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, VOCABULARY, 60)
    lengths = rng.integers(3, 20, 60)
    counted = [
        (s + np.arange(n)) % VOCABULARY for s, n in zip(starts, lengths, strict=True)
    ]
    return Batches(pack_rows(counted, 16), batch_size=8, seed=3)


def linears(model: Model) -> list:
    return [weight(model, path) for path in model.config.linears()]


def leaves_equal(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def largest_difference(left, right) -> float:
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(minus(left, right)))


def minus(left, right):
    """Difference of two trees, in host memory."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), left, right)


def total_and_weight(model: Model, batch: Batch, **options):
    return jax.jit(next_token(**options))(model, batch, KEY)


@jax.jit
def logits_of(model: Model, batch: Batch):
    """[batch, length, vocabulary]."""
    return model(batch.tokens, positions=batch.positions, segments=batch.segments)


def gradients(loss, model: Model, batch: Batch):
    """Mean loss and its gradient by the definition, outside the training step."""

    def mean(model):
        total, weight = loss(model, batch, KEY)
        return total / weight

    return jax.jit(jax.value_and_grad(mean))(model)


def one_step(model: Model, batch: Batch, **options):
    """A step of gradient descent at rate 1: parameters move by minus the gradient."""
    mine, frozen = split_model(model)
    sgd = optax.sgd(1.0)
    step = make_step(next_token(), sgd, **{"clip": None, **options})
    return step(initial_state(mine, sgd), frozen, batch)


class TestLoss:
    def test_equals_the_definition(self, model, data):
        """Sum of -log softmax over targets of the same document, by hand in numpy."""
        batch = data.batch(0)
        logits = np.asarray(logits_of(model, batch), np.float64)
        expected = count = 0.0
        tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
        for row in range(tokens.shape[0]):
            for at in range(tokens.shape[1] - 1):
                if segments[row, at] == segments[row, at + 1] != 0:
                    z = logits[row, at]
                    expected += np.log(np.exp(z).sum()) - z[tokens[row, at + 1]]
                    count += 1
        total, weight = total_and_weight(model, batch)
        assert float(weight) == count
        assert float(total) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("chunk", [4, 5])
    def test_chunks_change_neither_value_nor_gradient(self, model, data, chunk):
        batch = data.batch(1)
        whole = gradients(next_token(z=0.01), model, batch)
        parts = gradients(next_token(z=0.01, chunk=chunk), model, batch)
        assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
        assert largest_difference(parts[1], whole[1]) < 1e-6

    def test_chunks_never_hold_all_logits(self, model):
        def shapes(chunk):
            tokens = jnp.zeros((3, 16), jnp.int32)
            run = jax.grad(lambda m: next_token(chunk=chunk)(m, Batch(tokens), KEY)[0])
            return str(jax.make_jaxpr(run)(model))

        full = f"f32[3,16,{VOCABULARY}]"
        assert full in shapes(None)
        assert full not in shapes(4)

    def test_padding_never_matters(self, model, data):
        batch = data.batch(0)
        padding = jnp.zeros((8, 5), jnp.int32)
        wide = lambda x, fill: jnp.concatenate([x, padding.astype(x.dtype) + fill], 1)  # noqa: E731
        padded = Batch(
            tokens=wide(batch.tokens, 7),
            segments=wide(batch.segments, 0),
            positions=wide(batch.positions, 0),
            weights=wide(batch.weights, 0),
        )
        here, there = (gradients(next_token(), model, b) for b in (batch, padded))
        assert float(here[0]) == pytest.approx(float(there[0]), rel=1e-6)
        assert largest_difference(here[1], there[1]) < 1e-6

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_a_masked_position_may_hold_infinities(self, chunk):
        """The last hidden state predicts nothing: no gradient may see it."""
        given = SimpleNamespace(
            forward=lambda params, tokens, **_: params["hidden"],
            head=lambda params, hidden: hidden @ params["head"],
        )

        def total(params):
            model = SimpleNamespace(params=params, config=given)
            tokens = jnp.zeros((1, 3), jnp.int32)
            return next_token(chunk=chunk)(model, Batch(tokens), KEY)[0]

        params = {"hidden": jnp.ones((1, 3, 4)), "head": jnp.eye(4, 5)}
        broken = params | {"hidden": params["hidden"].at[0, 2].set(jnp.inf)}
        here, there = (jax.grad(total)(p) for p in (params, broken))
        assert bool(here["head"].any()) and leaves_equal(here, there)

    def test_targets_stay_in_their_document(self):
        segments = jnp.array([[1, 1, 2, 2, 0, 0]])
        share = jnp.array([[1.0, 0.5, 1.0, 0.25, 1.0, 1.0]])
        batch = Batch(jnp.arange(6)[None], segments, weights=share)
        following, weight = targets(batch)
        assert weight.tolist() == [[0.5, 0.0, 0.25, 0.0, 0.0, 0.0]]
        assert following[0, :5].tolist() == [1, 2, 3, 4, 5]

    def test_z_loss_adds_the_squared_normaliser(self, model, data):
        batch = data.batch(0)
        plain, _ = total_and_weight(model, batch)
        with_z, _ = total_and_weight(model, batch, z=0.1)
        log_z = jax.nn.logsumexp(logits_of(model, batch), -1)
        expected = 0.1 * (targets(batch)[1] * log_z**2).sum()
        assert float(with_z - plain) == pytest.approx(float(expected), rel=1e-4)


class TestStep:
    def test_accumulation_equals_the_full_batch(self, model, data):
        """Also where microbatches have unequal numbers of targets."""
        batch = data.batch(0)
        batch = dataclasses.replace(batch, weights=batch.weights.at[:3].set(0.0))
        _, expected = gradients(next_token(), model, batch)
        whole, seen = one_step(model, batch)
        parts, seen_in_parts = one_step(model, batch, accumulate=4)
        moved = minus(model, expected)
        assert largest_difference(whole.params, moved) < 1e-6
        assert largest_difference(parts.params, whole.params) < 1e-6
        assert float(seen.norm) == pytest.approx(float(seen_in_parts.norm), rel=1e-5)
        assert float(seen.tokens) == float(seen_in_parts.tokens) > 0

    def test_rows_that_do_not_split_are_refused(self, model, data):
        with pytest.raises(ValueError, match="8 rows do not split into 3"):
            one_step(model, data.batch(0), accumulate=3)

    def test_clipping_bounds_the_norm_and_keeps_the_direction(self, model, data):
        free, seen = one_step(model, data.batch(0))
        bound = float(seen.norm) / 4
        clipped, _ = one_step(model, data.batch(0), clip=bound)
        long, short = (minus(model, end.params) for end in (free, clipped))
        assert float(optax.global_norm(short)) == pytest.approx(bound, rel=1e-4)
        assert largest_difference(jax.tree.map(lambda x: x / 4, long), short) < 1e-6

    def test_frozen_part_is_neither_moved_nor_donated(self, model, data):
        mine, frozen = split_model(model, lambda path, leaf: path.startswith("norm"))
        sgd = optax.sgd(1.0)
        state = initial_state(mine, sgd)
        for _ in range(2):
            state, _ = make_step(next_token(), sgd)(state, frozen, data.batch(0))
        end = combine(state.params, frozen)
        assert leaves_equal(end.params["layers"], model.params["layers"])
        moved = end.params["norm"]["scale"] != model.params["norm"]["scale"]
        assert bool(moved.any())

    def test_mixed_precision_keeps_float32_masters(self, model, data):
        exact, one = one_step(model, data.batch(0))
        mixed, two = one_step(model, data.batch(0), policy=Policy(compute="bfloat16"))
        kinds = {leaf.dtype for leaf in jax.tree.leaves(mixed.params)}
        assert kinds == {jnp.dtype("float32")}
        assert 0 < abs(float(one.loss - two.loss)) < 0.05
        assert 0 < largest_difference(exact.params, mixed.params) < 0.05

    @pytest.mark.parametrize("bad", [float("nan"), 1e4])
    def test_a_spike_leaves_the_state_unchanged(self, model, data, bad):
        """A batch whose weights blow the loss up, after a calm stretch."""
        mine, frozen = split_model(model)
        adam = optimizer("adamw", 1e-3)
        plain = next_token()

        def loss(model, batch, key):
            total, weight = plain(model, batch, key)
            return total * batch.weights[0, 0], weight

        step = make_step(loss, adam, spikes=SpikeRule(warmup=3))
        state = initial_state(mine, adam)
        for at in range(4):
            state, seen = step(state, frozen, data.batch(at))
            assert int(seen.skipped) == 0
        before = jax.tree.map(np.array, state)
        batch = data.batch(4)
        spike = dataclasses.replace(batch, weights=batch.weights.at[0, 0].set(bad))
        state, seen = step(state, frozen, spike)
        assert int(seen.skipped) == int(state.guard.skipped) == 1
        assert leaves_equal(state.params, before.params)
        assert leaves_equal(state.optimizer, before.optimizer)
        assert int(state.step) == 5
        state, seen = step(state, frozen, batch)
        assert int(seen.skipped) == 0
        assert not leaves_equal(state.params, before.params)

    def test_a_lasting_change_of_level_is_accepted(self):
        judge = jax.jit(SpikeRule(warmup=2, loss_factor=2.0).judge)
        guard, refused = Guard.empty(), []
        for loss in [1.0] * 5 + [5.0] * 200:
            no, guard = judge(guard, jnp.float32(loss), jnp.float32(1.0))
            refused.append(bool(no))
        assert refused[5] and not any(refused[:5]) and not refused[-1]


class TestFit:
    def run(self, model, data, steps=6, **options):
        rate = schedule("cosine", 1e-2, 6, warmup=2)
        options = {"progress": False, "save_every": 2, **options}
        return fit(
            model, data, optimizer("adamw", rate), steps=steps, rate=rate, **options
        )

    def test_learns_to_count(self, model, data):
        rate = schedule("wsd", 1e-2, 60, warmup=5)
        adam = optimizer("adamw", rate)
        held = [data.batch(100)]
        trained, log = fit(
            model, data, adam, steps=60, rate=rate, held_out=held, progress=False
        )
        assert log[0]["loss"] == pytest.approx(np.log(VOCABULARY), rel=0.05)
        assert log[-1]["loss"] < 0.5
        total, weight = make_evaluation(next_token())(*split_model(trained), held[0])
        assert log[-1]["eval_loss"] == pytest.approx(float(total / weight), rel=1e-5)
        assert [row["lr"] for row in log] == [float(rate(at)) for at in range(60)]

    def test_resume_is_bit_exact(self, model, data, tmp_path):
        """Straight through, against two interruptions, one between resume points."""
        straight, log = self.run(model, data)
        for steps in (2, 5):
            self.run(model, data, steps, folder=tmp_path)
        resumed, rows = self.run(model, data, folder=tmp_path)
        assert leaves_equal(straight, resumed)
        facts = [(row["step"], row["loss"], row["lr"]) for row in rows]
        assert facts == [(row["step"], row["loss"], row["lr"]) for row in log]
        stored = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in stored] == rows

    def test_rows_beyond_the_resume_point_are_dropped(self, model, data, tmp_path):
        self.run(model, data, 2, folder=tmp_path)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')  # killed here
        _, rows = self.run(model, data, folder=tmp_path)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert rows[2]["loss"] != 9.0

    @pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
    def test_an_interrupt_saves_and_ends(self, model, data, tmp_path, kind):
        class Interrupting:
            def batch(self, step):
                if step == 3:
                    os.kill(os.getpid(), kind)
                return data.batch(step)

        before = signal.getsignal(kind)
        ends = SystemExit if kind == signal.SIGTERM else KeyboardInterrupt
        with pytest.raises(ends):
            self.run(model, Interrupting(), folder=tmp_path, save_every=100)
        assert signal.getsignal(kind) == before
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4"]
        resumed, _ = self.run(model, data, folder=tmp_path)
        straight, _ = self.run(model, data)
        assert leaves_equal(straight, resumed)

    def test_another_run_is_refused(self, model, data, tmp_path):
        self.run(model, data, 2, folder=tmp_path)
        with pytest.raises(ValueError, match="already holds a run, at step 2"):
            self.run(model, data, folder=tmp_path, resume=False)
        with pytest.raises(ValueError, match="at step 2, beyond the 1 steps wanted"):
            self.run(model, data, 1, folder=tmp_path)
        with pytest.raises(ValueError, match="another model, optimizer"):
            fit(model, data, optax.sgd(0.1), steps=4, folder=tmp_path, progress=False)

    def test_a_step_that_went_wrong_is_logged_as_json(self, model, data, tmp_path):
        def broken(model, batch, key):
            total, weight = next_token()(model, batch, key)
            return total * jnp.nan, weight

        trained, rows = self.run(model, data, 1, folder=tmp_path, loss=broken)
        assert rows[0]["skipped"] == 1 and rows[0]["loss"] is None
        text = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(text, parse_constant=pytest.fail) == rows[0]
        assert leaves_equal(trained, model)

    def test_the_given_model_survives(self, model, data):
        before = jax.tree.map(np.array, model)
        self.run(model, data, 2)
        assert leaves_equal(model, before)

    def test_data_parallel_equals_one_device(self, model, data):
        assert len(jax.devices()) == 8
        mesh = jax.make_mesh((8,), ("data",))
        one, alone = self.run(model, data, held_out=[data.batch(9)])
        many, spread = self.run(model, data, held_out=[data.batch(9)], mesh=mesh)
        assert largest_difference(one, jax.device_put(many, jax.devices()[0])) < 1e-5
        for a, b in zip(alone, spread, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        scale = many.params["norm"]["scale"]
        assert len(scale.sharding.device_set) == 8

    def test_short_rows_first(self, data):
        short = ShortFirst(data, 4, steps=2)
        assert short.batch(1).tokens.shape == (32, 4)
        assert (
            short.batch(1).tokens.reshape(8, 16).tolist()
            == data.batch(1).tokens.tolist()
        )
        assert short.batch(2).tokens.shape == (8, 16)
        with pytest.raises(ValueError, match="16 tokens do not split into rows of 5"):
            ShortFirst(data, 5, steps=1).batch(0)


class TestSchedules:
    def test_wsd(self):
        rate = schedule("wsd", 2.0, 100, warmup=10, decay=0.2, shape="linear")
        values = [float(rate(at)) for at in (0, 5, 10, 50, 80, 90, 100)]
        assert values == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0])
        longer = schedule("wsd", 2.0, 300, warmup=10, decay=20)
        assert all(float(rate(at)) == float(longer(at)) for at in range(80))

    def test_wsd_shapes(self):
        at = lambda shape: float(schedule("wsd", 1.0, 8, decay=4, shape=shape)(5))  # noqa: E731
        assert at("sqrt") == pytest.approx(0.5)
        assert at("exponential") == pytest.approx(0.01**0.25)

    def test_cosine_and_linear(self):
        rate = schedule("cosine", 1.0, 12, warmup=2, floor=0.1)
        assert float(rate(7)) == pytest.approx(0.55)
        assert float(rate(12)) == pytest.approx(0.1)
        line = schedule("linear", 1.0, 12, warmup=2, floor=0.5)
        assert float(line(7)) == pytest.approx(0.75)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_warmup_is_a_straight_line_to_the_peak(self, name):
        rate = schedule(name, 3.0, 50, warmup=6)
        assert [float(rate(at)) for at in (0, 2, 6)] == pytest.approx([0.0, 1.0, 3.0])

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (("cosin", 1.0, 9), {}, "did you mean 'cosine'"),
            (("wsd", -1.0, 9), {}, "rate is -1.0"),
            (("wsd", 1.0, 9), {"warmup": 9}, "warmup is 9"),
            (("wsd", 1.0, 9), {"decay": 20}, "decay of 20 does not fit 9 steps"),
            (("wsd", 1.0, 9), {"shape": "cubic"}, "shape is 'cubic'"),
        ],
    )
    def test_bad_input(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            schedule(*arguments, **options)


class TestOptimizers:
    def updates(self, chosen: optax.GradientTransformation, grads, params):
        """The first update."""
        run = jax.jit(lambda grads, p: chosen.update(grads, chosen.init(p), p)[0])
        return run(grads, params)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_approaches_a_target(self, model, name):
        """Towards a target of every leaf."""
        rate = {"muon": 0.1}.get(name, 0.02)
        options = {} if name in ("sgd", "adafactor") else {"weight_decay": 0.0}
        chosen = optimizer(name, rate, **options)
        away = lambda x: x + 0.5 * jax.random.normal(KEY, x.shape)  # noqa: E731
        goal = jax.tree.map(away, model.params)
        far = lambda params: (  # noqa: E731
            0.5 * optax.global_norm(jax.tree.map(jnp.subtract, params, goal)) ** 2
        )

        @jax.jit
        def move(params, state):
            updates, state = chosen.update(jax.grad(far)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = model.params, jax.jit(chosen.init)(model.params)
        for _ in range(60):
            params, state = move(params, state)
        assert float(far(params)) < 0.2 * float(far(model.params))

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_decay_is_of_matrices(self, model, name):
        chosen = optimizer(name, 0.1, weight_decay=0.1)
        zero = jax.tree.map(jnp.zeros_like, model.params)
        updates = self.updates(chosen, zero, model.params)
        assert not bool(updates["norm"]["scale"].any())
        q = updates["layers"]["0"]["attn"]["q"]["weight"]
        w = model.params["layers"]["0"]["attn"]["q"]["weight"]
        assert bool((jnp.sign(q) == -jnp.sign(w)).all())

    def test_muon_orthogonalises_hidden_matrices(self, model):
        """All singular values of an update are near 0.2 sqrt(max(in, out)) rate."""
        chosen = optimizer("muon", 1.0, weight_decay=0.0)
        grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), model.params)
        updates = self.updates(chosen, grads, model.params)
        q = np.linalg.svd(updates["layers"]["0"]["attn"]["q"]["weight"])[1]
        scale = 0.2 * np.sqrt(32)
        assert q.min() > 0.5 * scale and q.max() < 1.5 * scale
        embed = np.linalg.svd(updates["embed"]["weight"])[1]
        assert embed.max() > 3 * embed.min()  # Adam's: not orthogonal

    def test_bad_input(self):
        with pytest.raises(ValueError, match="did you mean 'adamw'"):
            optimizer("adam", 1e-3)
        with pytest.raises(ValueError, match=r"b2 of adamw is 1.5"):
            optimizer("adamw", 1e-3, b2=1.5)
        with pytest.raises(TypeError, match="lion has no 'eps'; it takes b1"):
            optimizer("lion", 1e-3, eps=1e-8)


TINY = dict(**SHAPE, max_length=32)


class TestTasks:
    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "text.txt"
        words = [f"line {i} of {i % 7} words\n" * 12 for i in range(40)]
        path.write_text(join_documents(words))
        return str(path)

    def config(self, **fields) -> TrainConfig:
        usual = dict(length=16, batch_size=4, steps=3, eval_batches=1, rate=5e-3)
        return train_config(usual | fields)

    def test_pretrain_then_continue(self, text, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        fields = dict(kind="pretrain", data=text, architecture=TINY, optimizer="muon")
        config = self.config(**fields, short_length=8, short_steps=2)
        model = run_training(config, tmp_path / "a")
        rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 3 and "eval_loss" in json.loads(rows[-1])
        found, step = newest_model(config, tmp_path / "a")
        assert step == 3 and leaves_equal(found, model)
        further = self.config(kind="continue", data=text, eval_data="none")
        again = run_training(further, tmp_path / "b", model=model)
        assert not leaves_equal(again, model)
        with pytest.raises(ValueError, match="another folder"):
            run_training(further, tmp_path / "a", model=model)

    def test_instruct_learns_from_the_assistant_alone(self, tmp_path):
        path = tmp_path / "chats.jsonl"
        row = {"prompt": "Say it.", "completion": "yes yes yes"}
        path.write_text((json.dumps(row) + "\n") * 40)
        config = self.config(
            kind="instruct", data=str(path), template="plain", length=64, steps=2
        )
        tokenizer = load_tokenizer("builtin:tiny")
        model = fresh(tokenizer.vocab_size)
        run_training(config, tmp_path / "run", model=model)
        first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
        answer = len(tokenizer.encode(" yes yes yes", bos=False)) + 1  # and the end
        assert first["tokens"] % answer == 0 and 0 < first["tokens"] < 4 * 64 / 2

    def test_lora_trains_the_adapters_alone(self, text, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        tokenizer = load_tokenizer("builtin:tiny")
        dense = fresh(tokenizer.vocab_size)
        config = self.config(kind="lora", data=text)
        with pytest.raises(ValueError, match="the model has none"):
            run_training(config, tmp_path / "x", model=dense)
        path = "layers.0.attn.q"
        base = dense.params["layers"]["0"]["attn"]["q"]["weight"]
        first = jax.random.normal(KEY, (32, 2)) * 0.1
        part = weights.Trainable(weights.LowRank(first, jnp.zeros((2, 32))))
        model = with_weight(dense, path, weights.Sum((base, part)))
        chosen, _ = split_model(model, adapters(model))
        assert len(jax.tree.leaves(chosen)) == 2
        trained = run_training(config, tmp_path / "y", model=model)
        end = trained.params["layers"]["0"]["attn"]["q"]["weight"]
        assert bool(end.terms[1].inner.second.any())
        assert leaves_equal(end.terms[0], base)
        assert leaves_equal(trained.params["embed"], dense.params["embed"])

    def test_scales_of_codes_train_alone(self, text, tmp_path, monkeypatch):
        """PEQA: codes and zeros stay, the merged model is the packed one."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        tokenizer = load_tokenizer("builtin:tiny")
        dense = fresh(tokenizer.vocab_size)
        model = methods.parse("peqa(2, group_size=16)")(dense)
        chosen, _ = split_model(model, adapters(model))
        groups = 2 * sum(weights.size(w) // 16 for w in linears(dense))
        assert 2 * sum(a.size for a in jax.tree.leaves(chosen)) == groups
        config = self.config(kind="lora", data=text, rate=1e-2, steps=20)
        trained = run_training(config, tmp_path / "run", model=model)
        packed = methods.parse("merge_adapters()")(trained)
        for before, after in zip(linears(model), linears(packed), strict=True):
            assert isinstance(after, weights.Quantized)
            assert leaves_equal(before.inner.planes, after.planes)
            assert leaves_equal(before.inner.zero, after.zero)
            assert not leaves_equal(before.inner.scale, after.scale)
        tokens = jax.random.randint(KEY, (2, 16), 0, tokenizer.vocab_size)
        np.testing.assert_array_equal(trained(tokens), packed(tokens))
        log = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            (dict(kind="pretain"), ValueError, "kind is 'pretain'"),
            (dict(learning_rate=1.0), ValueError, "unknown key 'learning_rate'"),
            (dict(steps=0), ValueError, "steps is 0"),
            (dict(steps=2.5), TypeError, "steps is 2.5, expected int"),
            (dict(scan=1), TypeError, "scan is 1, expected bool"),
            (dict(optimizer="adamm"), ValueError, "did you mean 'adam"),
            (dict(accumulate=3), ValueError, "batch_size 4 does not split"),
            (dict(short_length=5, short_steps=1), ValueError, "no multiple of 5"),
            (dict(architecture=TINY), ValueError, "starts from a model"),
            (dict(kind="pretrain"), ValueError, "starts from an architecture"),
            (dict(template="plain"), ValueError, "needs conversations"),
            (dict(data=None), TypeError, "data is None, expected str"),
        ],
    )
    def test_bad_input(self, fields, error, message):
        usual = dict(kind="continue", data="builtin:")
        with pytest.raises(error, match=message):
            self.config(**(usual | fields))

    def test_a_missing_key_is_named(self):
        with pytest.raises(ValueError, match="train lacks data"):
            train_config({"kind": "continue", "steps": 3})

    def test_a_tokenizer_of_another_model_is_refused(self, model, tmp_path):
        config = self.config(kind="continue", data="builtin:")
        with pytest.raises(ValueError, match="wrong tokenizer"):
            run_training(config, tmp_path / "run", model=model)
        assert not (tmp_path / "run").exists()


def test_the_committed_configuration_is_that_of_the_built_in_model(builtin, request):
    """configs/pretrain/builtin.yaml builds the shipped architecture."""
    path = request.config.rootpath / "configs" / "pretrain" / "builtin.yaml"
    config = train_config(yaml.safe_load(path.read_text())["train"])
    tokenizer = load_tokenizer(config.tokenizer)
    assert config.architecture.build(tokenizer.vocab_size) == builtin.config


def test_batches_of_texts_reach_the_loop_in_order(tmp_path):
    """The loader's order is a function of the step, whatever came before."""
    tokenizer = load_tokenizer("builtin:tiny")
    corpus = from_texts(["abc def\n" * 200])
    made = batches(corpus, tokenizer, 8, 2, cache=tmp_path)
    late = made.batch(5).tokens
    assert made.batch(0).tokens.shape == late.shape
    assert made.batch(5).tokens.tolist() == late.tolist()
