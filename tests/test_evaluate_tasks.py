"""Choice, generation tasks and the harness adapter, against enumeration by hand."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import Letters

from jaxllm.evaluate import (
    Problem,
    Question,
    choose,
    cloze,
    exact_match,
    harness_model,
    load_problems,
    load_questions,
    loglikelihoods,
    perplexity,
)
from jaxllm.evaluate.choice import encode_pair
from jaxllm.evaluate.harness import Requests
from jaxllm.evaluate.tasks import after_hashes, first_line
from jaxllm.generation import generate
from jaxllm.models import MLP, Attention, Layer, Transformer, init

LENGTH = 32
LOGITS = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def letters():
    return Letters()


@pytest.fixture(scope="module")
def tiny():
    layer = Layer(Attention(2, 1, 8), MLP(24))
    config = Transformer(130, 16, (layer,), tied=True, max_length=LENGTH, init_std=0.4)
    return init(config, jax.random.key(0))


def logprobs(model, ids):
    """Float64 log-probabilities of each next token, [length - 1, vocabulary]."""
    padded = jnp.zeros((1, LENGTH), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    logits = np.asarray(LOGITS(model, padded)[0], np.float64)[: len(ids) - 1]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(model, ids, count):
    """(log-likelihood, greedy) of the last ``count`` tokens."""
    table = logprobs(model, ids)[-count:]
    targets = np.asarray(ids)[-count:]
    chosen = table[np.arange(count), targets].sum()
    return chosen, bool((table.argmax(-1) == targets).all())


PAIRS = [
    ("the cat", " sat"),
    ("a", "b"),
    ("", "xyz"),
    ("on the mat ", "it lay"),
    ("q", "!"),
]


def test_loglikelihoods_are_sums_over_the_continuation(tiny, letters):
    for batch_size in (1, 4):
        got = loglikelihoods(tiny, letters, PAIRS, batch_size)
        for one, (context, continuation) in zip(got, PAIRS, strict=True):
            moved = len(context) - len(context.rstrip())
            ids = letters.encode(context + continuation)
            count = len(continuation) + moved
            want, greedy = by_hand(tiny, ids, count)
            assert one.logprob == pytest.approx(want, rel=1e-5)
            assert (one.tokens, one.greedy) == (count, greedy)


def test_a_greedy_continuation_is_recognised(tiny, letters):
    (written,) = generate(tiny, letters, "abc", 4, eos=())
    (right,) = loglikelihoods(tiny, letters, [("abc", written.text)])
    wrong = written.text[:-1] + chr((ord(written.text[-1]) + 1) % 128)
    (other,) = loglikelihoods(tiny, letters, [("abc", wrong)])
    assert right.greedy and not other.greedy


def test_long_contexts_lose_their_beginning(tiny, letters):
    long = "x" * 50 + "0123456789" * 3
    (got,) = loglikelihoods(tiny, letters, [(long, "end")])
    ids = letters.encode(long + "end")[-LENGTH:]
    assert got.logprob == pytest.approx(by_hand(tiny, ids, 3)[0], rel=1e-5)


def test_context_and_continuation_meet_as_in_the_harness(letters, stories_tokenizer):
    assert encode_pair(letters, "a ", "b") == (letters.encode("a"), [32, ord("b")])
    assert encode_pair(letters, "", "b") == ([128], [ord("b")])
    assert encode_pair(letters, "  ", "b") == ([128], [32, 32, ord("b")])
    t = stories_tokenizer
    before, after = encode_pair(t, "Once upon a", " time")
    assert before + after == t.encode("Once upon a time") and t.decode(after) == " time"


def test_accuracy_by_sum_bytes_and_tokens(tiny, letters):
    rng = np.random.default_rng(1)

    def word():
        return "".join(map(chr, rng.integers(97, 123, rng.integers(1, 9))))

    questions = [
        Question(tuple((f"{i} {word()}", f" {word()}") for _ in range(3)), i % 3)
        for i in range(20)
    ]
    right = {"sum": 0, "bytes": 0}
    for q in questions:
        sums = [by_hand(tiny, letters.encode(a + b), len(b))[0] for a, b in q.pairs]
        means = [s / len(b) for s, (_, b) in zip(sums, q.pairs, strict=True)]
        right["sum"] += int(np.argmax(sums) == q.answer)
        right["bytes"] += int(np.argmax(means) == q.answer)
    got = choose(tiny, letters, questions)
    for rule, count in right.items():
        p = count / 20
        assert got.accuracy[rule] == p
        assert got.stderr[rule] == pytest.approx(np.sqrt(p * (1 - p) / 19))
    assert got.accuracy["tokens"] == got.accuracy["bytes"]  # one byte a token here
    assert right["sum"] != right["bytes"], "the rules must differ for this to say much"


def write(path, rows):
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


LAYOUTS = {
    "own.jsonl": (
        {"context": "1 + 1 =", "choices": [" 3", " 2"], "answer": 1},
        Question((("1 + 1 =", " 3"), ("1 + 1 =", " 2")), 1),
    ),
    "hellaswag.jsonl": (
        {
            "activity_label": "Removing ice",
            "ctx_a": "A man [header] works.",
            "ctx_b": "he",
            "endings": ["stops [title] Then", "goes."],
            "label": "1",
        },
        Question(
            (
                ("Removing ice: A man works. He", " stops. Then"),
                ("Removing ice: A man works. He", " goes."),
            ),
            1,
        ),
    ),
    "blimp.jsonl": (
        {"sentence_good": "I am.", "sentence_bad": "I is.", "UID": "x"},
        Question((("", "I am."), ("", "I is.")), 0),
    ),
    "lambada.jsonl": (
        {"text": "he lost his mind"},
        Question((("he lost his", " mind"),)),
    ),
    "piqa.json": (
        {
            "instruction": "Please choose the correct solution to the question: "
            "How?\n\nSolution1: Like this: so.\n\nSolution2: Not.\n\n"
            "Answer format: solution1/solution2",
            "answer": "solution2",
        },
        Question(
            (
                ("Question: How?\nAnswer:", " Like this: so."),
                ("Question: How?\nAnswer:", " Not."),
            ),
            1,
        ),
    ),
    "winogrande.json": (
        {
            "instruction": "Please choose the correct answer to fill in the blank to "
            "complete the given sentence: Ann beat Bo so _ won.\n\n"
            "Option1: Ann Option2: Bo Answer format: option1/option2",
            "answer": "option1",
        },
        Question((("Ann beat Bo so Ann", " won."), ("Ann beat Bo so Bo", " won.")), 0),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read(tmp_path, name):
    row, question = LAYOUTS[name]
    assert load_questions(write(tmp_path / name, [row])) == [question]


def test_all_real_task_files_are_read(shared_data):
    sizes = {"hellaswag_500.jsonl": (500, 4), "piqa_test.json": (1838, 2)}
    files = sorted((shared_data / "tasks/mc").iterdir())
    files += sorted((shared_data / "tasks/blimp").iterdir())
    for file in files:
        questions = load_questions(file)
        count, choices = sizes.get(file.name, (len(questions), 2))
        assert len(questions) == count > 100
        assert all(len(q.pairs) >= choices for q in questions)
    problems = load_problems(shared_data / "tasks/gsm8k/test.jsonl")
    assert len(problems) == 1319 and problems[0].answer == "18"


def test_exact_match_counts_what_greedy_writes(tiny, letters):
    prompts = ["abc", "de", "xyz"]
    texts = [g.text for g in generate(tiny, letters, prompts, 8)]
    problems = [
        Problem(p, f" {first_line(t)} ") for p, t in zip(prompts, texts, strict=True)
    ]
    problems.append(Problem("abc", "not what it writes"))
    got = exact_match(tiny, letters, problems, max_new_tokens=8)
    assert (got.accuracy["exact"], got.count) == (0.75, 4)


def test_the_answer_of_gsm8k_is_after_the_hashes(tmp_path):
    row = {"question": "2 + 2?", "answer": "It is\n#### 1,004"}
    (problem,) = load_problems(write(tmp_path / "g.jsonl", [row]))
    assert (problem.prompt, problem.answer) == ("Question: 2 + 2?\nAnswer:", "1,004")
    assert after_hashes("so #### $5.\nmore") == "$5." and after_hashes("five") == ""


@pytest.mark.parametrize(
    ("row", "says"),
    [({"query": "x"}, "query.*known"), ({"instruction": "Do!", "answer": "1"}, "Do!")],
)
def test_other_layouts_are_refused(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        load_questions(write(tmp_path / "t.jsonl", [row]))
    with pytest.raises(ValueError, match="expected prompt and answer"):
        load_problems(tmp_path / "t.jsonl")
    with pytest.raises(FileNotFoundError, match="no task at"):
        load_questions(tmp_path / "missing.jsonl")


def test_bad_questions_are_refused(tiny, letters):
    with pytest.raises(ValueError, match="no questions"):
        choose(tiny, letters, [])
    with pytest.raises(ValueError, match="answer is 2, expected 0 to 1"):
        Question((("a", "b"), ("a", "c")), 2)
    with pytest.raises(ValueError, match="non-empty choices"):
        Question((("a", ""),))
    with pytest.raises(ValueError, match="are mixed"):
        choose(tiny, letters, [Question((("a", "b"),)), Question((("a", "b"),) * 2)])
    with pytest.raises(
        ValueError, match="continuation 1 has 40 tokens, expected 1 to 31"
    ):
        loglikelihoods(tiny, letters, [("a", "b"), ("a", "b" * 40)])


def asked(*args):
    return SimpleNamespace(args=args)


TEXTS = (
    "One day a cat sat down. The cat was happy. It saw a red ball. It ran.",
    "A dog came by. Both played until the evening. Then they went home.",
)


@pytest.mark.parametrize("kind", ["words", "orders"])
def test_questions_from_text_have_its_own_continuation_as_the_answer(kind):
    if kind == "words":
        drawn = cloze.next_words(TEXTS, context=20, choices=3)
    else:
        drawn = cloze.orders(TEXTS, context=20)
    asked = list(itertools.islice(drawn, 60))
    assert {q.answer for q in asked} == set(range(3 if kind == "words" else 2))
    for question in asked:
        contexts, options = zip(*question.pairs, strict=True)
        assert len({*contexts}) == 1 and len(contexts[0]) <= 20
        assert len({*options}) == len(options)
        right = contexts[0] + options[question.answer]
        assert any(right in text for text in TEXTS)
    if kind == "orders":  # the same two sentences, so that length decides nothing
        assert all(len({len(o) for _, o in q.pairs}) == 1 for q in asked)
        assert not any(
            c + o in text
            for q in asked
            for text in TEXTS
            for i, (c, o) in enumerate(q.pairs)
            if i != q.answer
        )


def test_questions_are_drawn_by_seed_and_refuse_what_gives_none():
    some = lambda seed: list(  # noqa: E731
        itertools.islice(cloze.orders(TEXTS, seed=seed), 20)
    )
    assert some(0) == some(0) != some(1)
    with pytest.raises(ValueError, match="three different"):
        next(cloze.orders(["One sentence. One sentence."]))
    with pytest.raises(ValueError, match="1 choices; accepted: 2"):
        next(cloze.next_words(TEXTS, choices=1))


@pytest.fixture(scope="module")
def adapter(tiny, letters):
    return Requests(tiny, letters, batch_size=4)


def test_the_adapter_gives_likelihoods(adapter, tiny, letters):
    got = adapter.loglikelihood([asked(*pair) for pair in PAIRS])
    want = loglikelihoods(tiny, letters, PAIRS, 4)
    assert got == [(w.logprob, w.greedy) for w in want]


@pytest.mark.parametrize("length", [5, LENGTH - 1, LENGTH, 3 * LENGTH])
def test_rolling_likelihood_counts_each_token_once(adapter, tiny, letters, length):
    text = "the quick brown fox jumps over it "[: min(length, 31)] * (1 + length // 31)
    (got,) = adapter.loglikelihood_rolling([asked(text)])
    ids, room, total = letters.encode(text), LENGTH - 1, 0.0
    for at in range(0, len(ids) - 1, room):
        part = ids[at : at + 1 + room]
        total += by_hand(tiny, part, len(part) - 1)[0]
    assert got == pytest.approx(total, rel=1e-5)
    if len(ids) <= LENGTH:
        alone = perplexity(tiny, letters, [text], "documents")
        assert got == pytest.approx(-alone.nll * alone.tokens, rel=1e-5)


def test_the_adapter_generates_until(adapter, tiny, letters):
    greedy = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    sampled = {"until": [], "max_gen_toks": 3, "temperature": 0.5, "do_sample": True}
    requests = [asked("abc", greedy), asked("abc", sampled), asked("de", greedy)]
    got = adapter.generate_until(requests)
    want = generate(tiny, letters, ["abc", "de"], 6, stop="\n\n")
    assert [got[0], got[2]] == [w.text for w in want]
    assert got[1] == generate(tiny, letters, "abc", 3, temperature=0.5)[0].text
    (late,) = adapter.generate_until([asked("x" * 60 + "abc", greedy)])
    ids = letters.encode("x" * 60 + "abc")[-(LENGTH - 6) :]
    assert late == generate(tiny, letters, [ids], 6, stop="\n\n")[0].text
    with pytest.raises(ValueError, match=r"beams.*accepted: until"):
        adapter.generate_until([asked("a", {"beams": 2})])


@pytest.mark.slow
def test_lm_evaluation_harness_runs_a_task_with_it(tiny, letters, tmp_path):
    pytest.importorskip("lm_eval", reason="the harness itself is an optional extra")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    rows = [
        {"sentence_good": f"{w} runs", "sentence_bad": f"{w} run"}
        for w in ("he", "she", "it", "ann", "bo")
    ]
    files = {"test": str(write(tmp_path / "pairs.json", rows))}
    config = dict(
        task="pairs",
        dataset_path="json",
        dataset_kwargs=dict(data_files=files, cache_dir=str(tmp_path)),
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="",
        doc_to_choice="{{[sentence_good, sentence_bad]}}",
        doc_to_target=0,
        target_delimiter="",
        metric_list=[dict(metric="acc")],
    )
    model = harness_model(tiny, letters)
    task = ConfigurableTask(config=config)
    found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    own = choose(tiny, letters, write(tmp_path / "pairs.jsonl", rows))
    assert found["results"]["pairs"]["acc,none"] == own.accuracy["sum"]
