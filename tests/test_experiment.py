"""Experiments: what is refused, what is written, and that a run resumes exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from jaxllm import checkpoint, methods, models
from jaxllm.checkpoint import FolderStore
from jaxllm.cli import main
from jaxllm.core.compose import compose
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.experiment import notebook, prepare, reader, runner, schema, sources
from jaxllm.experiment.folder import differences
from jaxllm.experiment.schema import PerplexityConfig

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny model (a checkpoint with its tokenizer) and a text."""
    folder = tmp_path_factory.mktemp("work")
    # All linear maps have one shape: one compilation of each solver.
    layer = models.Layer(models.Attention(2, 2, 16), models.MLP(32))
    config = models.Transformer(2048, 32, (layer,) * 2, tied=True, max_length=64)
    model = models.init(config, jax.random.key(0))
    tokenizer = load_tokenizer("builtin:tiny")
    checkpoint.save(model, folder / "model", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    return folder


def data(work, output, **changes) -> dict:
    """A small experiment as YAML data."""
    text = str(work / "text.txt")
    return {
        "name": "small",
        "model": str(work / "model"),
        "calibration": {"source": text, "samples": 4, "length": 32, "batch_size": 4},
        "transforms": ["wanda('2:4')", {"gptq": {"bits": 4, "group_size": 16}}],
        "evaluate": {
            "perplexity": [{"texts": text, "window": 32, "limit": 4}],
            "speed": False,
        },
        "generate": {"prompt": "def f", "max_new_tokens": 4},
        "output": str(output),
    } | changes


def quiet(text: str) -> None:
    pass


def run(values: dict, **options) -> Path:
    config = schema.experiment(values)
    return runner.run(config, progress=False, **{"echo": quiet} | options)


def write(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(scope="module")
def finished(work, tmp_path_factory):
    return run(data(work, tmp_path_factory.mktemp("runs")))


def leaves_of(model) -> list[bytes]:
    return [leaf.tobytes() for leaf in jax.tree.leaves(model)]


# What is refused, and in which words


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("calibration.sampels=3", r"calibration.sampels: unknown key .* 'samples'"),
        ("calibration.samples=many", r"calibration.samples: expected a whole number"),
        ("calibration.samples=true", r"calibration.samples: expected a whole number"),
        (
            "calibration.mode=rows",
            r"calibration.mode: 'rows' is unknown; accepted: win",
        ),
        ("evaluate.speed=3", r"evaluate.speed: expected true or false, got 3"),
        ("evaluate.perplexity.0.windw=8", r"perplexity.0.windw: unknown key"),
        ("transforms.1.gptq.bitz=3", r"transforms.1.gptq.bitz: unknown key .* 'bits'"),
        ("transforms.1.gptq.bits=9", r"transforms.1.gptq: integer format of 9 bits"),
        (
            "transforms.0=wanad(0.5)",
            r"transforms.0: unknown method 'wanad'; nearest: w",
        ),
        ("transforms.0=absmax()", r"transforms.0: .* is not a transform"),
        ("transforms.0={a: 1, b: 2}", r"transforms.0: expected one method .* got a, b"),
        ("transforms.1.gptq.correct={low_rnk: {}}", r"gptq.correct.low_rnk: unknown"),
        ("transforms.5.gptq.bits=3", r"'5' is no index of 2 items"),
        ("transforms.0.wanda.sparsity=1", r"there is no 'wanda' inside"),
        ("name=a/b", r"name 'a/b'; accepted: letters"),
        ("model", r"'model' is not an override; expected key=value"),
        ("output=[", r"the value of output is not valid YAML"),
    ],
)
def test_bad_configuration_is_named_with_its_place(work, tmp_path, assignment, words):
    file = write(tmp_path / "x.yaml", data(work, tmp_path / "runs"))
    with pytest.raises((ValueError, TypeError), match=words):
        schema.load(file, (assignment,))


def test_yaml_numbers_and_doubled_keys():
    assert reader.parse_yaml("a: 1e-4\nb: 1.5E3\nc: 2e", "x") == {
        "a": 1e-4,
        "b": 1500.0,
        "c": "2e",
    }
    with pytest.raises(ValueError, match="key 'bits' occurs twice"):
        reader.parse_yaml("gptq:\n  bits: 4\n  bits: 3\n", "x")


def test_overrides_change_copies():
    before = {"a": [{"b": 1}], "c": None}
    assert reader.override(before, "a.0.b=[1, x]") == {
        "a": [{"b": [1, "x"]}],
        "c": None,
    }
    assert reader.override(before, "c.d=2")["c"] == {"d": 2}
    assert before == {"a": [{"b": 1}], "c": None}


def test_text_and_mapping_write_the_same_transform():
    nested = {
        "where": {
            "pattern": "layers.*.mlp",
            "transform": {"gptq": {"bits": 3, "correct": {"low_rank": {"rank": 4}}}},
        }
    }
    text = 'where("layers.*.mlp", gptq(bits=3, correct=low_rank(rank=4)))'
    assert schema.build(nested, "t") == schema.build(text, "t") == methods.parse(text)
    assert schema.build("rtn", "t") == schema.build({"rtn": None}, "t")


def test_merged_configuration_loads_as_itself(work, tmp_path):
    config = schema.experiment(data(work, tmp_path))
    again = schema.experiment(yaml.safe_load(str(config)))
    assert again == config and again.evaluate.perplexity[0].window == 32
    assert differences(config.data, again.data) == []


def test_committed_configurations_load():
    for file in (REPOSITORY / "configs").rglob("*.yaml"):
        assert schema.load(file).transforms or schema.load(file).train, file


# Before any compute


def corrupt(folder: Path, work: Path) -> str:
    checkpoint.save(sources.open_model(str(work / "model")), folder / "broken")
    (folder / "broken" / "manifest.json").write_text("{")
    return str(folder / "broken")


BAD = {
    "missing model": (lambda t, w: {"model": str(t / "no")}, "no model at"),
    "damaged model": (lambda t, w: {"model": corrupt(t, w)}, "damaged"),
    "missing text": (
        lambda t, w: {"evaluate": {"perplexity": [{"texts": str(t / "no.txt")}]}},
        "no corpus at",
    ),
    "short calibration": (lambda t, w: {"calibration": short(t)}, "shorter than one"),
    "long window": (
        lambda t, w: {"calibration": {"source": str(w / "text.txt"), "length": 512}},
        "calibration.length is 512, the model's maximum length 64",
    ),
    "unwritable": (lambda t, w: {"output": str(w / "text.txt")}, "cannot write to"),
    "unfit method": (
        lambda t, w: {"transforms": ["rtn(bits=4, group_size=16)", "gptq(bits=4)"]},
        "has no dense part left to compress",
    ),
    "window of one token": (
        lambda t, w: judged(w, window=1),
        "evaluate.perplexity.0: window is 1, expected 2 to 64",
    ),
    "no windows": (
        lambda t, w: judged(w, limit=0),
        "evaluate.perplexity.0: limit is 0, expected 1 or more",
    ),
    "no rows": (
        lambda t, w: judged(w, batch_size=0),
        "evaluate.perplexity.0: batch_size is 0, expected 1 or more",
    ),
    "no questions": (
        lambda t, w: {"evaluate": {"tasks": [{"path": "x.jsonl", "limit": 0}]}},
        "evaluate.tasks.0: limit is 0, expected 1 or more",
    ),
    "no new tokens": (
        lambda t, w: {"generate": {"max_new_tokens": 0}},
        "generate: max_new_tokens is 0, expected 1 or more",
    ),
    "long prompt": (
        lambda t, w: {"generate": {"prompt": "def f " * 60}},
        "the model's maximum length is 64",
    ),
    "missing training text": (
        lambda t, w: trained(w, kind="continue", data=str(t / "no.txt")),
        "no corpus at",
    ),
    "no adapters": (
        lambda t, w: trained(w, kind="lora"),
        "train: kind 'lora' trains adapters, and the model has none",
    ),
    "pattern": (
        lambda t, w: {"transforms": ['where("layers.*.mpl", rtn())']},
        "matches no weight; nearest: layers.",
    ),
}


def short(folder: Path) -> dict:
    (folder / "short.txt").write_text("x = 1\n")
    return {"source": str(folder / "short.txt"), "length": 32}


def judged(work: Path, **changes) -> dict:
    text = {"texts": str(work / "text.txt"), "window": 32}
    return {"evaluate": {"perplexity": [text | changes], "speed": False}}


def trained(work: Path, **changes) -> dict:
    usual = dict(data=str(work / "text.txt"), steps=2, length=32, batch_size=2)
    return {"train": usual | changes}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_compute(name, work, tmp_path, capsys):
    changes, words = BAD[name]
    values = data(work, tmp_path / "runs") | changes(tmp_path, work)
    assert main(["run", write(tmp_path / "x.yaml", values), "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_wrong_tokenizer(work, tmp_path, shared_data):
    values = data(work, tmp_path)
    values["tokenizer"] = str(shared_data / "models/stories260K/tok512.bin")
    with pytest.raises(ValueError, match="512 ids, the model's vocabulary 2048"):
        run(values)


def test_dry_run_prints_the_sizes_that_come_true(work, finished, tmp_path):
    shown: list[str] = []
    target = run(data(work, tmp_path / "runs"), dry_run=True, echo=shown.append)
    assert not target.exists()
    config = schema.experiment(data(work, tmp_path / "runs"))
    planned = prepare.stages(prepare.prepare(config))
    report = json.loads((finished / "report.json").read_text())
    assert [s.bytes for s in planned] == [s["size"]["total"] for s in report["steps"]]
    assert all(f"{s.bytes:,}" in "\n".join(shown) for s in planned)


# A whole run


def test_a_run_is_the_composition_of_its_transforms(work, finished):
    config = schema.experiment(data(work, finished.parent))
    calibration = prepare.prepare(config).calibration
    dense = checkpoint.restore(work / "model")
    whole = compose(*schema.transforms(config))
    expected = whole(dense, calibration, jax.random.key(config.seed))
    found = sources.open_model(str(finished / "checkpoint"))
    assert leaves_of(found) == leaves_of(expected)
    assert found.history.specs == expected.history.specs == whole.transforms
    manifest = checkpoint.read_manifest(finished / "checkpoint")
    assert manifest["calibration"] == calibration.spec
    assert manifest["seeds"] == {"experiment": 0}


def test_what_a_run_leaves(finished):
    names = {p.name for p in finished.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "report.json", "report.md"}
    assert names == expected | {"report.png", "checkpoint"}
    report = json.loads((finished / "report.json").read_text())
    dense, pruned, final = report["steps"]
    assert dense["size"]["total"] > pruned["size"]["total"] > final["size"]["total"]
    assert all(step["perplexity"] for step in report["steps"])
    assert report["checkpoint"]["bit_equal"] and report["checkpoint"]["disk"] > 0
    assert set(report["samples"]) == {"dense", "gptq(group_size=16)"}
    text = (finished / "report.md").read_text()
    assert all(f"{step['size']['total']:,}" in text for step in report["steps"])
    assert dense["perplexity"][label(finished)]["protocol"] in text


def label(folder: Path) -> str:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return PerplexityConfig(**config["evaluate"]["perplexity"][0]).label


def test_a_finished_run_is_left_alone(work, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    shown: list[str] = []
    run(data(work, finished.parent), echo=shown.append)
    assert len(shown) == 1 and "is finished" in shown[0]
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_another_configuration_needs_another_name(work, finished):
    with pytest.raises(ValueError, match=r"seed: 0 -> 1.*choose another name.*restart"):
        run(data(work, finished.parent, seed=1))
    assert (finished / "report.md").exists()


def test_only_runs_are_deleted(work, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "precious").write_text("")
    for restart in (False, True):
        with pytest.raises(ValueError, match="holds no run"):
            run(data(work, tmp_path), restart=restart)
    assert (tmp_path / "small" / "precious").exists()


def test_resumes_inside_a_transform(work, finished, tmp_path, monkeypatch):
    """Killed after the first block of the second transform, then run again."""
    saved, save = [], FolderStore.save

    def dying(self, name, tree):
        save(self, name, tree)
        saved.append(f"{self.path.name}/{name}")
        if saved[-1].startswith("layers-2"):
            raise KeyboardInterrupt

    values = data(work, tmp_path)
    monkeypatch.setattr(FolderStore, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(values)
    monkeypatch.undo()
    assert not (tmp_path / "small" / "report.md").exists()
    half = (tmp_path / "small" / "metrics.jsonl").read_text()
    (tmp_path / "small" / "metrics.jsonl").write_text(half + '{"step": 2, "ki')

    loaded, load = [], FolderStore.load

    def counting(self, name):
        found = load(self, name)
        loaded.append((f"{self.path.name}/{name}", found is not None))
        return found

    monkeypatch.setattr(FolderStore, "load", counting)
    shown: list[str] = []
    resumed = run(values, echo=shown.append)
    assert "resumed after wanda(sparsity='2:4')" in shown
    assert [found for _, found in loaded] == [True, False]
    assert all(name.startswith("layers-2") for name, _ in loaded)
    kept = [json.loads(r) for r in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in kept if r["kind"] == "measured"] == [0, 1, 2]
    a, b = (sources.open_model(str(f / "checkpoint")) for f in (resumed, finished))
    assert leaves_of(a) == leaves_of(b)


def test_restart_deletes_and_runs_again(work, tmp_path):
    """A run without transforms, timed: the dense model is reported alone."""
    values = data(work, tmp_path, transforms=[])
    values["evaluate"] = values["evaluate"] | {"speed": True}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "old").write_text("")
    write(
        tmp_path / "small" / "config.yaml", schema.experiment(values | {"seed": 1}).data
    )
    folder = run(values, restart=True)
    assert not (folder / "old").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
    (step,) = json.loads((folder / "report.json").read_text())["steps"]
    assert step["speed"]["decode"] > 0


def test_pretraining_runs_and_is_reported(work, tmp_path):
    architecture = dict(width=32, layers=2, heads=2, kv_heads=2, head_dim=16, hidden=32)
    train = dict(kind="pretrain", data=str(work / "text.txt"), steps=2, length=32)
    train |= dict(batch_size=2, architecture=architecture | {"max_length": 64})
    values = data(work, tmp_path, transforms=[], model=None, train=train)
    report = json.loads((run(values) / "report.json").read_text())
    assert [s["name"] for s in report["steps"]] == ["untrained", "train(pretrain)"]
    with pytest.raises(ValueError, match="pretraining makes its own model"):
        run(values | {"model": str(work / "model")})


# The command


def test_help_does_not_import_jax():
    code = "import sys, jaxllm.cli as c; c.parser(); print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_list_and_show_know_every_method(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name, entry in methods.entries().items():
        assert name in shown and entry.card.title in shown
    assert main(["show", "gptq"]) == 0
    assert "2210.17323" in capsys.readouterr().out
    assert main(["list", "qantize"]) == 2
    assert "accepted: " in capsys.readouterr().err


def test_overrides_may_stand_behind_an_option(work, tmp_path, capsys):
    values = data(work, tmp_path / "runs", transforms=["lora(2)"])
    file = write(tmp_path / "x.yaml", values | trained(work, kind="lora"))
    assert main(["run", file, "name=a", "--dry-run", "seed=7", "dtype=bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("name: a", "seed: 7", "dtype: bfloat16"))
    for command in (["run", file, "--dry-run"], ["version"]):
        for wrong in ("sead", "--sead=7") + ("seed=7",) * (command == ["version"]):
            with pytest.raises(SystemExit):
                main([*command, wrong])
            assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err


def test_compare_marks_the_pareto_front(finished, tmp_path, capsys):
    folder = tmp_path / "compared"
    assert main(["compare", str(finished), "--output", str(folder)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:5]
    report = json.loads((finished / "report.json").read_text())
    sizes = [s["size"]["total"] for s in report["steps"]]
    scores = [
        next(iter(s["perplexity"].values()))["perplexity"] for s in report["steps"]
    ]
    pairs = [*zip(sizes, scores, strict=True)]
    best = {
        f"{size:,}": not any(
            a <= size and b <= score for a, b in pairs if (a, b) != (size, score)
        )
        for size, score in pairs
    }
    found = {row.split("|")[3].strip(): row.endswith("| * |") for row in rows}
    assert found == best
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(tmp_path)]) == 2


def test_export_of_a_run(work, finished, tmp_path, capsys):
    from jaxllm.models import hub

    target = tmp_path / "exported"
    assert main(["export", str(finished / "checkpoint"), str(target)]) == 2
    assert "only dense models" in capsys.readouterr().err and not target.exists()
    assert main(["export", str(finished / "checkpoint"), str(target), "--dense"]) == 0
    model = sources.open_model(str(finished / "checkpoint"))
    tokens = jax.numpy.arange(8)[None]
    gap = abs(hub.load_model(target)(tokens) - model(tokens)).max()
    assert gap < 1e-4
    assert load_tokenizer(target).vocab_size == 2048


def test_a_model_without_a_tokenizer_is_saved_and_exported(work, tmp_path):
    model = notebook.load(str(work / "model"))
    for name, expected in (("with", True), ("without", False)):
        notebook.save(model, str(tmp_path / name))
        notebook.export(model, str(tmp_path / f"{name}-exported"))
        found = checkpoint.restore_tokenizer(tmp_path / name, load_tokenizer)
        exported = (tmp_path / f"{name}-exported" / "tokenizer.json").exists()
        assert (found is not None) == exported == expected
        checkpoint.save(model, tmp_path / "bare", overwrite=True)
        model = notebook.load(str(tmp_path / "bare"))


def test_traceback_is_shown_when_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["run", str(tmp_path / "no.yaml"), "--traceback"])
    assert main(["version"]) == 0
