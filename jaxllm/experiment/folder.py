"""The folder of a run: its configuration, journal and resume points."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from jaxllm import checkpoint, methods
from jaxllm.checkpoint import storage
from jaxllm.core.model import Model
from jaxllm.experiment.schema import Experiment

CONFIG, JOURNAL, RESUME = "config.yaml", "metrics.jsonl", "resume"


class RunFolder:
    """``runs/<name>/``: what is done is written down at once, and found again.

    Rows of the journal are JSON objects with the ``step`` (0 is the dense model) and
    the ``kind`` of what was found.

    Raises:
      ValueError: The folder holds a run of another configuration, or no run.
      PermissionError: It cannot be written.
    """

    def __init__(self, config: Experiment):
        self.path = config.folder
        self.config = config
        self.rows: list[dict[str, Any]] = []

    def check(self) -> None:
        """Refuse a folder that this run must not use; nothing is written."""
        checkpoint.check_writable(self.path)
        file = self.path / CONFIG
        if file.exists():
            self._check_same(yaml.safe_load(file.read_text(encoding="utf-8")))
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run")

    def _check_same(self, before: Any) -> None:
        changed = differences(before, self.config.data)
        if changed:
            lines = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
            raise ValueError(
                f"{self.path} holds a run of another configuration ({lines}): choose "
                "another name=..., or --restart to delete it"
            )

    def restart(self) -> None:
        """Delete the run that is there; a folder that holds none is refused."""
        if not self.path.exists():
            return
        if any(self.path.iterdir()) and not (self.path / CONFIG).exists():
            raise ValueError(f"{self.path} holds no run: it is not deleted")
        shutil.rmtree(self.path)

    def open(self) -> None:
        """Create it, or read what an earlier process has done."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG, str(self.config))
        journal = self.path / JOURNAL
        if journal.exists():
            self.rows = complete_rows(journal)
            write_text(journal, "".join(json.dumps(r) + "\n" for r in self.rows))

    def read(self) -> list[dict[str, Any]]:
        """The journal of a run that may be finished, without changing anything."""
        journal = self.path / JOURNAL
        return complete_rows(journal) if journal.exists() else []

    def add(self, step: int, kind: str, **values) -> dict[str, Any]:
        """Append a row to the journal."""
        row = {"step": step, "kind": kind, "time": round(time.time(), 1)} | values
        self.rows.append(row)
        with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def find(self, step: int, kind: str) -> dict[str, Any] | None:
        """The row of a step, or None when that has not been done."""
        wanted = (r for r in self.rows if (r["step"], r["kind"]) == (step, kind))
        return next(wanted, None)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def point(self, step: int) -> Path:
        return self.path / RESUME / f"model-{step}"

    def layers(self, step: int) -> checkpoint.FolderStore:
        """The resume points inside a transform, one per block."""
        return checkpoint.FolderStore(self.path / RESUME / f"layers-{step}")

    def save_point(self, step: int, model: Model, **notes) -> int:
        """Keep the model after a transform; bytes on disk. Earlier points go."""
        checkpoint.save(model, self.point(step), overwrite=True, notes=notes)
        self.layers(step).clear()
        for earlier in range(step):
            shutil.rmtree(self.point(earlier), ignore_errors=True)
        return checkpoint.stored_bytes(self.point(step))

    def latest(self, last: int) -> tuple[int, Model] | None:
        """The newest whole model of this run and its step."""
        for step in range(last, 0, -1):
            if storage.exists(self.point(step)):
                found = checkpoint.restore(self.point(step), resolve=methods.find)
                return step, found
        return None

    def close(self) -> None:
        """The resume points have served."""
        shutil.rmtree(self.path / RESUME, ignore_errors=True)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """What differs between two configurations, as ``path: old -> new``.

    >>> differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1]})
    ['a.b: 1 -> 2']
    """
    if isinstance(before, list) and isinstance(after, list):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{path}: {before!r} -> {after!r}"]
    found = []
    for key in {**before, **after}:
        place = f"{path}.{key}" if path else str(key)
        found += differences(before.get(key), after.get(key), place)
    return found


def complete_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; one that a crash cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
