"""``jaxllm run``: validate, plan, transform and measure step by step, save, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import pallas_kernels
from jaxllm import checkpoint, methods
from jaxllm.core.model import Model, check_finite
from jaxllm.core.walk import Monitor
from jaxllm.experiment import report, sources
from jaxllm.experiment.folder import RunFolder
from jaxllm.experiment.measure import headline, measure, sample
from jaxllm.experiment.prepare import Prepared, describe, prepare
from jaxllm.experiment.schema import Experiment

Echo = Callable[[str], None]


def run(
    config: Experiment,
    *,
    dry_run: bool = False,
    restart: bool = False,
    progress: bool = True,
    echo: Echo = print,
) -> Path:
    """Run an experiment, or go on where an earlier process stopped.

    Everything is validated first; then the merged configuration and a plan are
    printed, where ``dry_run`` stops. Each transform is measured and saved, so that an
    interrupted run loses at most one block of one transform. The folder ends with
    ``config.yaml``, ``metrics.jsonl``, ``report.md``, ``report.json``, a plot and a
    checkpoint whose restored logits are bit-equal.

    Args:
      restart: Delete the run that is in the folder.
      progress: Show progress bars.

    Returns:
      The folder of the run.

    Raises:
      ValueError, TypeError, FileNotFoundError, PermissionError: Before any compute.
    """
    folder = RunFolder(config)
    if restart and not dry_run:
        folder.restart()
    if not (restart and dry_run):
        folder.check()
    if any(row["kind"] == "finished" for row in folder.read()) and not dry_run:
        echo(f"{folder.path} is finished: read {folder.path / 'report.md'}")
        return folder.path
    prepared = prepare(config)
    echo(str(config))
    echo(describe(prepared, folder.path))
    if dry_run:
        return folder.path
    folder.open()
    with pallas_kernels.backend(config.backend):
        _Run(prepared, folder, progress, echo).all()
    return folder.path


class _Run:
    """One process's share of a run; what the folder has is not done again.

    Step 0 is the model as loaded; then come the transforms, then the training.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, progress, echo: Echo):
        self.prepared, self.folder = prepared, folder
        self.progress, self.echo = progress, echo
        self.config = prepared.config
        first = "untrained" if prepared.pretrains else "dense"
        self.names = [first, *map(repr, prepared.transforms)]
        if self.config.train is not None:
            self.names.append(f"train({self.config.train.kind})")

    def all(self) -> None:
        found = self.folder.latest(len(self.names) - 1)
        if found is None:
            at, model = 0, self._dense()
        else:
            at, model = found
            self.echo(f"resumed after {self.names[at]}")
        self._measure(at, model)
        for step in range(at + 1, len(self.names)):
            model = self._advance(step, model)
            self._measure(step, model)
        self._save(model)
        report.write(self.folder, self.names)
        self.folder.add(len(self.names) - 1, "finished")
        self.folder.close()
        self.echo(f"report: {self.folder.path / 'report.md'}")

    def _dense(self) -> Model:
        """The model before the first transform."""
        started = time.perf_counter()
        if self.prepared.pretrains:
            from jaxllm.train import tasks

            return tasks.starting_model(self.config.train, self.prepared.tokenizer)
        model = sources.open_model(self.config.model, self.config.dtype)
        check_finite(model)
        seconds = time.perf_counter() - started
        self.echo(f"loaded {self.config.model} in {seconds:.1f} s")
        return model

    def _advance(self, step: int, model: Model) -> Model:
        """The next model, saved with what it took."""
        started = time.perf_counter()
        monitor = Monitor(self.progress, self.folder.layers(step))
        if step <= len(self.prepared.transforms):
            key = jax.random.fold_in(jax.random.key(self.config.seed), step - 1)
            run = self.prepared.transforms[step - 1]
            model = run(model, self.prepared.calibration, key, monitor=monitor)
        else:
            model = self._train(model, monitor)
        jax.block_until_ready(jax.tree.leaves(model))
        seconds = time.perf_counter() - started
        check_finite(model)
        disk = self.folder.save_point(step, model)
        values = dict(seconds=round(seconds, 3), disk=disk, blocks=monitor.events)
        self.folder.add(step, "made", name=self.names[step], **values)
        self.echo(f"{self.names[step]}: {seconds:.1f} s")
        return model

    def _train(self, model: Model, monitor: Monitor) -> Model:
        from jaxllm.train import tasks

        start = None if self.prepared.pretrains else model
        folder = self.folder.path / "train"
        return tasks.run_training(self.config.train, folder, monitor, model=start)

    def _measure(self, step: int, model: Model) -> None:
        """Measure a model once, and let the first and the last one write a sample."""
        name = self.names[step]
        if self.folder.find(step, "measured") is None:
            found = measure(model, self.prepared, self.progress)
            self.folder.add(step, "measured", name=name, **found)
            self.echo(f"{name}: {headline(found)}")
        ends = step in (0, len(self.names) - 1) and self.config.generate is not None
        if ends and self.folder.find(step, "sample") is None:
            text = sample(model, self.prepared)
            self.folder.add(step, "sample", name=name, text=text)
            self.echo(f"{name} writes:\n{text}")

    def _save(self, model: Model) -> None:
        """The final checkpoint, restored and compared."""
        prepared, target = self.prepared, self.folder.checkpoint
        checkpoint.save(
            model,
            target,
            tokenizer=prepared.tokenizer,
            calibration=prepared.calibration,
            seeds={"experiment": self.config.seed},
            notes={"experiment": self.config.data},
            overwrite=True,
        )
        restored = checkpoint.restore(target, resolve=methods.find)
        tokens = np.arange(min(32, model.config.max_length))[None]
        equal = sources.same_logits(model, restored, tokens % model.config.vocab_size)
        if not equal:
            raise RuntimeError(f"the logits of {target} differ from the saved model's")
        disk = checkpoint.stored_bytes(target)
        step = len(self.names) - 1
        self.folder.add(step, "checkpoint", disk=disk, bit_equal=equal)
        self.echo(f"saved {target}: {disk:,} bytes; restored logits are bit-equal")
