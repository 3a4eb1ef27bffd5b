"""Text in: what every corpus, tokenizer, packing, sample and batch order must keep."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from jaxllm import data
from jaxllm.data import builtin as library
from jaxllm.data import chat, corpora, token_cache
from jaxllm.data.llama2c import Llama2c

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 1 and 1."},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And 2?"},
    {"role": "assistant", "content": "Four, of course."},
]
TEXTS = [f"document {i}: " + "word " * (i % 7 + 1) for i in range(60)]


def unicode_texts(count: int = 200) -> list[str]:
    """Random strings from every plane, without surrogates."""
    draw = random.Random(0)
    planes = [(0x20, 0x7F), (0xA0, 0x2FF), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF)]
    planes.append((0x1, 0x10FFFF))

    def character() -> str:
        code = draw.randint(*draw.choice(planes))
        return "?" if 0xD800 <= code < 0xE000 else chr(code)

    words = [" ", "  ", "\n", "\n\n    ", "\t", "def f(x):", "0123", "\r\n"]
    return [
        "".join(
            draw.choice(words) if draw.random() < 0.3 else character()
            for _ in range(draw.randint(1, 40))
        )
        for _ in range(count)
    ]


def write_llama2c(path: Path) -> Path:
    """A small tokenizer of llama2.c's layout: bytes, letters, some merges."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    pieces += [f"<0x{i:02X}>".encode() for i in range(256)]
    merges = [b" t", b"he", b" the", b"in", b"an", b" a", b" an", b"the", b"ing", b"er"]
    pieces += [*merges, *(bytes([b]) for b in b" abcdefghijklmnopqrstuvwxyz.,")]
    record = b"".join(
        np.float32(-index).tobytes() + np.int32(len(piece)).tobytes() + piece
        for index, piece in enumerate(pieces)
    )
    path.write_bytes(np.int32(8).tobytes() + record)
    return path


def write_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(folder / "small"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "small.model"


@pytest.fixture(scope="module")
def tiny():
    return data.load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module", params=["builtin", "llama2c", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "builtin":
        return data.load_tokenizer("builtin:tiny")
    if request.param == "llama2c":
        return data.load_tokenizer(write_llama2c(folder / "tok.bin"))
    return data.load_tokenizer(write_sentencepiece(folder))


class TestCorpora:
    def test_no_text_of_the_evaluation_slice_is_in_training(self):
        train, held = data.documents("builtin:"), data.documents("builtin:", "eval")
        paths = {file["path"] for file in library.evaluation_record()["files"]}
        assert not paths & set(library.training_files())
        lines = set().union(*map(library.telling_lines, held))
        assert max(library.overlap(text, lines) for text in train) <= 0.5
        assert not set(train) & set(held)

    def test_other_versions_of_an_evaluation_file_stay_out(self, monkeypatch, tmp_path):
        text = next(iter(data.documents("builtin:", "eval")))
        files = {
            "heapq.py": "rewritten = True\n",  # the path of an evaluation file
            "copied.py": text,
            "renamed/edited.py": text.replace("self", "me", text.count("self") // 4),
            "empty.py": "",
            "tests/other.py": "a test\n",
            "new.py": "innocent = True\n",
        }
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(library, "library", lambda: tmp_path)
        assert library.training_files.__wrapped__() == ("new.py",)

    def test_evaluation_slice_is_what_its_record_says(self):
        record = library.evaluation_record()
        held = list(data.documents("builtin:", "eval"))
        assert [library.sha256(t) for t in held] == [
            file["sha256"] for file in record["files"]
        ]
        joined = corpora.join_documents(held).encode()
        assert len(joined) == record["bytes"] <= 200_000
        assert joined == (library.ASSETS / "eval.txt").read_bytes()
        assert "PYTHON SOFTWARE FOUNDATION" in (
            library.ASSETS / record["licence"]
        ).read_text(encoding="utf-8")

    def test_reading_again_gives_the_same(self):
        corpus = data.documents("builtin:")
        first = list(itertools.islice(corpus, 5))
        assert list(itertools.islice(corpus, 5)) == first
        assert data.documents("builtin:").digest == corpus.digest
        assert len(corpus) == sum(1 for _ in corpus)

    def test_digest_sees_boundaries(self):
        assert (
            data.from_texts(["ab", "c"]).digest != data.from_texts(["a", "bc"]).digest
        )

    def test_formats_hold_the_same_documents(self, tmp_path):
        import pyarrow
        from pyarrow import parquet

        texts = [text.strip() for text in TEXTS]
        lines = "\n".join(json.dumps({"body": text}) for text in texts)
        (tmp_path / "a.jsonl").write_text(lines + "\n\n")
        (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
        parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.txt", "a.parquet"):
            corpus = data.documents(tmp_path / name, "all", field="body")
            assert list(corpus) == texts, name
        assert list(data.documents(tmp_path, "all", field="body")) == texts * 3

    def test_split_by_content_never_leaks(self, tmp_path):
        path = tmp_path / "twice.txt"
        path.write_text("\n<|endoftext|>\n".join(TEXTS * 2))
        sides = [data.documents(path, s, holdout=0.3) for s in ("train", "eval")]
        train, held = map(list, sides)
        assert not set(train) & set(held)
        assert sorted(train + held) == sorted(t.strip() for t in TEXTS * 2)
        assert 0.1 < len(held) / len(train + held) < 0.5

    def test_single_document_is_cut_at_a_line(self, tmp_path):
        path = tmp_path / "long.txt"
        path.write_text("".join(f"line {i}\n" for i in range(100)))
        train, held = (next(iter(data.documents(path, s))) for s in ("train", "eval"))
        assert train + held == path.read_text()
        assert held.startswith("line ") and train.endswith("\n")

    def test_bad_input(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"title": "x", "body": "y"}\n')
        (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnot json\n')
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "folder").mkdir()
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
            data.documents(tmp_path / "nowhere.txt")
        with pytest.raises(FileNotFoundError, match=r"\.jsonl"):
            data.documents(tmp_path / "folder")
        with pytest.raises(ValueError, match=r"'text'.*\['body', 'title'\]"):
            data.documents(tmp_path / "a.jsonl")
        with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
            list(data.documents(tmp_path / "bad.jsonl", "all"))
        with pytest.raises(ValueError, match="no document"):
            data.documents(tmp_path / "empty.txt")
        with pytest.raises(ValueError, match=r"'test'.*train, eval, all"):
            data.documents("builtin:", "test")
        with pytest.raises(ValueError, match="builtin:other"):
            data.documents("builtin:other")

    def test_wrong_column_lists_the_columns(self, tmp_path):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"no column 'text'.*\['body'\]"):
            data.documents(tmp_path / "a.parquet")

    def test_hub_without_network_is_one_clear_error(self, monkeypatch):
        import huggingface_hub

        def refuse(*_, **__):
            raise OSError("no route to host")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
        with pytest.raises(ConnectionError, match=r"'owner/name'.*no route"):
            data.documents("hf:owner/name/config")


class TestTokenizers:
    def test_round_trip(self, tokenizer):
        for text in unicode_texts():
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_ends(self, tokenizer):
        bare = tokenizer.encode("the words", bos=False)
        assert tokenizer.encode("the words", eos=True) == [
            tokenizer.bos_id,
            *bare,
            tokenizer.eos_id,
        ]
        assert max(bare) < tokenizer.vocab_size

    def test_batch_equals_one_by_one(self, tokenizer):
        ids = tokenizer.encode_batch(TEXTS, eos=True)
        assert ids == [tokenizer.encode(text, eos=True) for text in TEXTS]

    def test_save_and_load(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        again = data.load_tokenizer(tmp_path)
        assert again.fingerprint == tokenizer.fingerprint
        assert [again.bos_id, again.eos_id, again.pad_id] == [
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        ]
        assert again.encode("the words") == tokenizer.encode("the words")

    def test_builtin_has_indentation_as_tokens(self, tiny):
        for text in ("\n   ", "\n       ", "\n           "):
            assert len(tiny.encode(text + " x", bos=False)) == 2
        assert (tiny.vocab_size, tiny.pad_id, tiny.bos_id, tiny.eos_id) == (
            2048,
            0,
            1,
            2,
        )

    def test_builtin_compresses_unseen_python(self, tiny):
        texts = list(data.documents("builtin:", "eval"))
        tokens = sum(map(len, tiny.encode_batch(texts)))
        assert sum(len(text.encode()) for text in texts) / tokens > 3

    def test_llama2c_merges_as_run_c(self, tmp_path):
        tokenizer = data.load_tokenizer(write_llama2c(tmp_path / "tok.bin"))
        assert tokenizer._by_word
        for text in [*unicode_texts(50), "the thing  in the antheer", " a the "]:
            assert tokenizer.encode(text) == [1, *run_c(tokenizer, f" {text}")]

    def test_llama2c_whole_text_equals_word_by_word(self, tmp_path):
        tokenizer = data.load_tokenizer(write_llama2c(tmp_path / "tok.bin"))
        for text in ("the thing  in the antheer   ", " a the " * 50):
            words = tokenizer.encode(text)
            tokenizer._by_word = False
            assert tokenizer.encode(text) == words
            tokenizer._by_word = True

    def test_stories_tokenizer(self, stories_tokenizer, shared_data):
        once = "Once upon a time, there was a little girl named Lily."
        ids = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395]
        assert stories_tokenizer.encode(once) == [*ids, 317, 426]
        corpus = data.documents(shared_data / "text/tinystories.txt", "all")
        for story in itertools.islice(corpus, 20):
            ids = stories_tokenizer.encode(story)
            assert ids == [1, *run_c(stories_tokenizer, f" {story}")]
            assert stories_tokenizer.decode(ids) == story

    @pytest.mark.parametrize("asked", [None, True, False])
    def test_beginning_follows_the_configuration(self, tiny, tmp_path, asked):
        tiny.save(tmp_path)
        config = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}
        if asked is not None:
            config["add_bos_token"] = asked
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ids = data.load_tokenizer(tmp_path).encode("x")
        assert (ids[0] == 1) == (asked is not False)

    @pytest.mark.parametrize("asked", [None, True, False])
    def test_sentencepiece_begins_as_configured(self, tmp_path, asked):
        write_sentencepiece(tmp_path).rename(tmp_path / "tokenizer.model")
        plain = data.load_tokenizer(tmp_path)
        config = {} if asked is None else {"add_bos_token": asked}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = data.load_tokenizer(tmp_path)
        bare = plain.encode("the", bos=False)
        start = [] if asked is False else [plain.bos_id]
        assert tokenizer.encode("the") == start + bare
        assert tokenizer.encode("the", bos=False) == bare
        assert (tokenizer.fingerprint == plain.fingerprint) == (asked is not False)
        (tmp_path / "copy").mkdir()
        tokenizer.save(tmp_path / "copy")
        again = data.load_tokenizer(tmp_path / "copy")
        assert again.fingerprint == tokenizer.fingerprint

    def test_wrong_tokenizer_for_the_model(self, tiny):
        data.check_vocabulary(tiny, 2048)
        data.check_vocabulary(tiny, 2176)  # padded embedding rows
        for size in (512, 32000):
            with pytest.raises(ValueError, match=rf"2048.*{size}"):
                data.check_vocabulary(tiny, size)

    def test_bad_input(self, tiny, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
            data.load_tokenizer(tmp_path / "nowhere.json")
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
            data.load_tokenizer(tmp_path)
        for name in ("tokenizer.json", "x.model", "x.bin"):
            (tmp_path / name).write_bytes(b"\x01\x02\x03\x04\x05\x06\x07\x08\x09")
            with pytest.raises(ValueError, match=name):
                data.load_tokenizer(tmp_path / name)
        with pytest.raises(ValueError, match=r"2048 is outside"):
            tiny.decode([2048])
        with pytest.raises(ValueError, match="builtin:tiny"):
            data.load_tokenizer("builtin:huge")


def run_c(tokenizer: Llama2c, text: str) -> list[int]:
    """llama2.c's `encode` as run.c writes it: rescan all pairs after each merge."""
    index, ids = tokenizer._index, []
    for character in text.encode().decode():
        piece = character.encode()
        ids += [index[piece]] if piece in index else [byte + 3 for byte in piece]
    while True:
        best, place, joined = -1e10, -1, -1
        for i in range(len(ids) - 1):
            pair = tokenizer._pieces[ids[i]] + tokenizer._pieces[ids[i + 1]]
            found = index.get(pair)
            if found is not None and tokenizer._scores[found] > best:
                best, place, joined = tokenizer._scores[found], i, found
        if place < 0:
            return ids
        ids[place : place + 2] = [joined]


def ragged(count: int = 40, longest: int = 30) -> list[list[int]]:
    """Documents whose tokens are all different, so that each can be found again."""
    lengths = np.random.default_rng(0).integers(1, longest, size=count)
    fresh = itertools.count(1)
    return [[next(fresh) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("fit", ["stream", "best"])
class TestPacking:
    def test_every_token_exactly_once(self, fit):
        documents = ragged()
        rows = data.pack_rows(documents, 16, fit=fit)
        kept = rows.tokens[rows.segments > 0]
        assert sorted(kept) == list(range(1, sum(map(len, documents)) + 1))
        assert not rows.tokens[rows.segments == 0].any()
        np.testing.assert_array_equal(rows.weights, rows.segments > 0)

    def test_segments_are_pieces_of_one_document(self, fit):
        documents = ragged()
        owner = {token: i for i, ids in enumerate(documents) for token in ids}
        rows = data.pack_rows(documents, 16, fit=fit)
        for tokens, segments, positions in zip(
            rows.tokens, rows.segments, rows.positions, strict=True
        ):
            for number in range(1, segments.max() + 1):
                inside = segments == number
                piece = tokens[inside]
                assert len({owner[token] for token in piece}) == 1
                np.testing.assert_array_equal(np.diff(piece), 1)  # in order, unbroken
                np.testing.assert_array_equal(positions[inside], np.arange(len(piece)))

    def test_padding_only_where_it_must_be(self, fit):
        documents = ragged()
        rows = data.pack_rows(documents, 16, fit=fit)
        if fit == "stream":
            assert (rows.segments[:-1] > 0).all()
            return
        for tokens in rows.tokens:  # every document that fits a row lies in one
            for ids in documents:
                if len(ids) <= 16 and ids[0] in tokens:
                    assert set(ids) <= set(tokens)
        free = (rows.segments == 0).sum(axis=1)
        used = 16 - free
        # Any two rows that could be one would break best fit.
        assert all(used[i] + used[j] > 16 for i in range(len(used)) for j in range(i))

    def test_weights_travel_with_their_tokens(self, fit):
        documents = ragged()
        weights = [[token % 3 for token in ids] for ids in documents]
        rows = data.pack_rows(documents, 16, weights=weights, fit=fit)
        np.testing.assert_array_equal(rows.weights, rows.tokens % 3)

    def test_bad_input(self, fit):
        with pytest.raises(ValueError, match="length is 0"):
            data.pack([[1]], 0, fit=fit)
        with pytest.raises(ValueError, match="no tokens"):
            data.pack([[]], 4, fit=fit)
        with pytest.raises(ValueError, match="document 0"):
            data.pack([[1, 2]], 4, weights=[[1.0]], fit=fit)
        with pytest.raises(ValueError, match="tight"):
            data.pack([[1]], 4, fit="tight")


def test_best_fit_places_long_documents_first():
    rows = data.pack_rows([[1] * n for n in (2, 2, 8, 8)], 10, fit="best")
    assert len(rows) == 2 and (rows.segments > 0).all()


class TestCalibration:
    def test_is_a_value(self, tiny):
        corpus = data.from_texts(TEXTS)
        one = data.calibrate(corpus, tiny, samples=10, length=16, batch_size=4)
        two = data.calibrate(corpus, tiny, samples=10, length=16, batch_size=4)
        passes = [[np.asarray(b.tokens) for b in one] for _ in range(2)]
        assert [b.shape for b in passes[0]] == [(4, 16), (4, 16), (2, 16)]
        for first, second in zip(*passes, strict=True):
            np.testing.assert_array_equal(first, second)
        assert (one, hash(one), one.digest) == (two, hash(two), two.digest)
        other = data.calibrate(corpus, tiny, samples=10, length=16, seed=1)
        assert other.digest != one.digest

    def test_windows_are_windows_of_the_text(self, tiny):
        text = "".join(f"{i} " for i in range(500))
        drawn = data.calibrate(data.from_texts([text]), tiny, samples=5, length=20)
        for row in drawn.tokens:
            assert tiny.decode(row) in text

    def test_windows_reach_both_ends(self, tiny):
        stream = tiny.encode("0123456789")
        corpus = data.from_texts(["0123456789"])
        drawn = data.calibrate(corpus, tiny, samples=50, length=len(stream) - 1)
        assert {tuple(row) for row in drawn.tokens} == {
            tuple(stream[:-1]),
            tuple(stream[1:]),
        }

    @pytest.mark.parametrize("mode", ["windows", "documents"])
    def test_digest_is_the_same_in_another_process(self, tiny, mode):
        program = (
            "from jaxllm import data; t = data.load_tokenizer('builtin:tiny');"
            "c = data.from_texts([f'text {i} ' * (i + 1) for i in range(40)]);"
            f"print(data.calibrate(c, t, 6, 24, 3, mode='{mode}').digest)"
        )
        corpus = data.from_texts([f"text {i} " * (i + 1) for i in range(40)])
        here = data.calibrate(corpus, tiny, 6, 24, 3, mode=mode).digest
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        there = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert there.stdout.strip() == here

    def test_documents_begin_at_their_beginning(self, tiny):
        corpus = data.from_texts(TEXTS)
        drawn = data.calibrate(
            corpus, tiny, samples=4, length=32, batch_size=3, mode="documents"
        )
        for batch in drawn:
            starts = (batch.positions == 0) & (batch.segments > 0)
            assert (np.asarray(batch.tokens)[np.asarray(starts)] == tiny.bos_id).all()

    def test_from_tokens(self):
        tokens = np.arange(12).reshape(3, 4)
        drawn = data.Calibration.from_tokens(tokens, batch_size=2)
        got = np.concatenate([b.tokens for b in drawn])
        np.testing.assert_array_equal(got, tokens)
        assert (drawn.samples, drawn.length, len(drawn)) == (3, 4, 2)
        for bad in (tokens.astype(float), tokens[0], tokens[:0]):
            with pytest.raises(ValueError, match="expected integers"):
                data.Calibration.from_tokens(bad)

    def test_bad_input(self, tiny):
        corpus = data.from_texts(["short"])
        count = len(tiny.encode("short"))
        with pytest.raises(ValueError, match=rf"has {count} tokens, a window 512"):
            data.calibrate(corpus, tiny)
        with pytest.raises(ValueError, match="fewer than the 128"):
            data.calibrate(corpus, tiny, mode="documents")
        with pytest.raises(ValueError, match="samples is 0"):
            data.calibrate(corpus, tiny, samples=0)
        with pytest.raises(ValueError, match="mode is 'rows'"):
            data.calibrate(corpus, tiny, mode="rows")


class TestBatches:
    @pytest.fixture
    def make(self, tiny, tmp_path):
        def make(**options) -> data.Batches:
            corpus = data.from_texts(TEXTS)
            return data.batches(corpus, tiny, 16, 8, cache=tmp_path, **options)

        return make

    def test_resuming_is_knowing_the_step(self, make):
        first = [np.asarray(b.tokens) for b in itertools.islice(make().steps(), 40)]
        again = make()  # from the cache on disk
        for step in (39, 0, 17):
            np.testing.assert_array_equal(again.batch(step).tokens, first[step])
        assert (np.asarray(make(seed=1).batch(0).tokens) != first[0]).any()

    def test_every_row_once_an_epoch_in_a_new_order(self, make):
        loader = make()
        count = len(loader.rows)
        steps = range(int(2 * loader.steps_per_epoch) + 1)
        order = np.concatenate([loader.indices(step) for step in steps])
        epochs = order[:count], order[count : 2 * count]
        for epoch in epochs:
            assert sorted(epoch) == list(range(count))
        assert (epochs[0] != epochs[1]).any()

    @pytest.mark.parametrize("count", [2, 4])
    def test_processes_together_equal_one(self, make, count):
        for step in (0, 9):
            parts = [
                make(process_index=i, process_count=count).batch(step)
                for i in range(count)
            ]
            for name in ("tokens", "segments", "positions", "weights"):
                union = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(union, getattr(make().batch(step), name))

    def test_stream_rows_equal_packing(self, make, tiny):
        rows = make().rows
        packed = data.pack_rows([tiny.encode(t, eos=True) for t in TEXTS], 16)
        got = rows.take(range(len(rows)))
        for name in ("tokens", "segments", "positions", "weights"):
            expected = getattr(packed, name)[: len(rows)]
            np.testing.assert_array_equal(getattr(got, name), expected)

    def test_cache_entry_is_whole_or_absent(self, tiny, tmp_path):
        def broken():
            yield "one"
            raise RuntimeError("the disk is full")

        corpus = corpora.Corpus("broken", broken, version="1")
        with pytest.raises(RuntimeError, match="disk"):
            data.tokenise(corpus, tiny, cache=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_cache_is_keyed_by_content_and_options(self, tiny, tmp_path):
        def tokens(texts, **options):
            corpus = data.from_texts(texts)
            stream = data.tokenise(corpus, tiny, cache=tmp_path, **options)
            return stream.digest, len(stream.tokens)

        digests = {tokens(["one"])[0], tokens(["two"])[0]}
        digests |= {tokens(["one"], eos=False)[0], tokens(["one"], max_tokens=1)[0]}
        assert len(digests) == 4
        assert tokens(["one"]) == tokens(["one"])
        assert tokens(["one"] * 9, max_tokens=4)[1] < 9

    def test_damaged_cache_is_refused(self, tiny, tmp_path):
        stream = data.tokenise(data.from_texts(["some text"]), tiny, cache=tmp_path)
        with (tmp_path / stream.digest / "tokens.bin").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(ValueError, match="damaged"):
            data.tokenise(data.from_texts(["some text"]), tiny, cache=tmp_path)

    def test_default_cache_follows_xdg(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert token_cache.default_cache() == tmp_path / "jaxllm" / "tokens"

    def test_bad_input(self, make, tiny, tmp_path):
        with pytest.raises(ValueError, match="row of 4096 tokens"):
            data.batches(data.from_texts(TEXTS), tiny, 4096, 8, cache=tmp_path)
        with pytest.raises(ValueError, match="8 rows does not split over 3"):
            make(process_count=3)
        with pytest.raises(ValueError, match="process_index is 2"):
            make(process_index=2, process_count=2)
        with pytest.raises(ValueError, match="step is -1"):
            make().batch(-1)


class TestChat:
    @pytest.mark.parametrize("template", [CHATML, chat.PLAIN])
    def test_weights_cover_the_assistant_alone(self, tokenizer, template):
        tokens, weights = data.render_chat(TALK, tokenizer, template)
        assert set(weights) == {0, 1}
        said = tokenizer.decode(tokens[weights > 0])
        heard = tokenizer.decode(tokens[weights == 0])
        for message in TALK:
            mine = message["role"] == "assistant"
            assert (message["content"] in said) == mine
            assert (message["content"] in heard) != mine

    def test_plain_template_teaches_to_stop(self, tiny):
        tokens, weights = data.render_chat(TALK, tiny, chat.PLAIN)
        ends = tokens == tiny.eos_id
        assert ends.sum() == 2 and weights[ends].all()
        assert tokens[0] == tiny.bos_id and (tokens == tiny.bos_id).sum() == 1

    def test_prompt_is_the_beginning_of_the_answered_one(self, tiny):
        prompt = data.render_text(TALK[:2], tiny, CHATML, add_generation_prompt=True)
        ids = tiny.encode(prompt, bos=False)
        tokens, weights = data.render_chat(TALK, tiny, CHATML)
        assert tokens[: len(ids)].tolist() == ids
        assert not weights[: len(ids)].any() and weights[len(ids)]

    def test_template_that_rewrites_the_past_is_refused(self, tiny):
        last = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
        with pytest.raises(ValueError, match="rewrites earlier turns"):
            data.render_chat(TALK, tiny, last)

    def test_template_language(self, tiny):
        text = "{{ strftime_now('%Y') }}{{ messages | tojson }}"
        now = datetime(2024, 5, 1)
        got = data.render_text(
            [{"role": "user", "content": "<é>"}], tiny, text, now=now
        )
        assert got == '2024[{"role": "user", "content": "<é>"}]'
        with pytest.raises(ValueError, match="roles alternate"):
            data.render_text(TALK, tiny, "{{ raise_exception('roles alternate') }}")
        with pytest.raises(ValueError, match="malformed"):
            data.render_text(TALK, tiny, "{% for %}")
        with pytest.raises(ValueError, match="refuses"):  # the sandbox
            data.render_text(TALK, tiny, "{{ messages.append(1) }}")
        with pytest.raises(ValueError, match="no chat template"):
            data.render_text(TALK, tiny)

    def test_packed_conversations(self, tiny):
        rows = data.pack_chats([TALK, TALK[1:3]], tiny, 128, chat.PLAIN)
        single = [data.render_chat(t, tiny, chat.PLAIN)[1] for t in (TALK, TALK[1:3])]
        assert rows.weights.sum() == sum(w.sum() for w in single)
        assert len(data.Batches(rows, 1).batch(0).tokens) == 1
        with pytest.raises(ValueError, match="none of 1 conversations"):
            data.pack_chats([TALK], tiny, 4, chat.PLAIN)


class TestInstructions:
    ANSWER = ({"role": "assistant", "content": "2"},)
    LAYOUTS = (
        {
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "2"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "gpt", "value": "2"},
            ]
        },
        {"instruction": "1 + 1?", "input": "", "output": "2"},
        {"prompt": "1 + 1?", "completion": "2"},
    )
    PAIRS = (
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {
            "conversations": [{"from": "human", "value": "1 + 1?"}],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        {  # whole conversations; the prompt is repeated
            "prompt": "1 + 1?",
            "chosen": [{"role": "user", "content": "1 + 1?"}, *ANSWER],
            "rejected": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "3"},
            ],
        },
    )

    @pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
    def test_layouts_mean_the_same(self, tmp_path, suffix):
        path = tmp_path / f"rows.{suffix}"
        for row in self.LAYOUTS:
            write_rows(path, [row])
            (got,) = data.load_conversations(path)
            assert got == self.LAYOUTS[0]["messages"]

    def test_pairs_mean_the_same(self, tmp_path):
        path = tmp_path / "pairs.json"
        write_rows(path, list(self.PAIRS))
        for pair in data.load_preferences(path):
            assert pair.prompt == ({"role": "user", "content": "1 + 1?"},)
            assert pair.chosen == self.ANSWER
            assert pair.rejected[0]["content"] == "3"

    def test_real_pairs(self, shared_data):
        path = shared_data / "pref/dpo_en_200.json"
        pairs = data.load_preferences(path)
        raw = json.loads(path.read_text())
        assert len(pairs) == len(raw) == 200
        for pair, row in zip(pairs, raw, strict=True):
            assert pair.prompt[-1]["role"] == "user"
            assert pair.chosen[-1]["content"] == row["chosen"]["value"]
            assert pair.rejected[-1]["content"] == row["rejected"]["value"]

    def test_bad_input(self, tmp_path):
        path = tmp_path / "rows.json"
        with pytest.raises(FileNotFoundError, match=r"rows\.json"):
            data.load_conversations(path)
        write_rows(path, [self.LAYOUTS[0], {"question": "1 + 1?"}])
        with pytest.raises(ValueError, match=r"example 1.*\['question'\].*messages"):
            data.load_conversations(path)
        with pytest.raises(ValueError, match="no chosen and rejected"):
            data.load_preferences(path)
        write_rows(path, [{"chosen": "2", "rejected": "3"}])
        with pytest.raises(ValueError, match="without a prompt"):
            data.load_preferences(path)


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
