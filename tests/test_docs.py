"""What README, notebooks and tables say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxllm.methods.__main__ import inserted, tables

REPOSITORY = Path(__file__).resolve().parent.parent


def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", tables())
def test_method_tables_are_the_generated_ones(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert text == inserted(text, tables()[name]), "run: python -m jaxllm.methods"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """The notebook snippet, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)
    code = code.replace("samples=32", "samples=4").replace("length=256", "length=64")
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    assert (tmp_path / "runs/small/manifest.json").exists()
    assert space["again"].history.specs == space["small"].history.specs
    assert "layers.*.mlp" in repr(space["small"])


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "colab").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebooks_execute(path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, 4)
    assert not any(c.get("outputs") for c in notebook.cells), (
        "commit it without outputs"
    )
    made = client.NotebookClient(notebook, timeout=900).execute()
    last = made.cells[-1].outputs[-1]["data"]["text/plain"]
    assert last == "True"
    tables = [
        output["data"]["text/markdown"]
        for cell in made.cells
        for output in cell.get("outputs", ())
        if "text/markdown" in output.get("data", {})
    ]
    assert any("gptq" in text for text in tables), "the report renders as a table"


def test_public_names_are_what_they_say_after_every_import():
    """Importing a package must not shadow the function of that name."""
    import importlib
    import inspect

    import jaxllm

    for name in ("generation", "evaluate", "checkpoint", "experiment", "methods"):
        importlib.import_module(f"jaxllm.{name}")
    for name in jaxllm.__all__:
        value = getattr(jaxllm, name)
        assert callable(value) and not inspect.ismodule(value), name
    assert set(jaxllm.__all__) <= set(dir(jaxllm))
