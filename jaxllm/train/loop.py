"""The training loop: batches in, model out; resumable, observable, interruptible."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from tqdm import tqdm

from jaxllm.core.batch import Batch
from jaxllm.core.model import Model, combine
from jaxllm.train.losses import Loss, next_token
from jaxllm.train.saving import ResumePoints
from jaxllm.train.state import State, initial_state, split_model
from jaxllm.train.step import SpikeRule, make_evaluation, make_step


class BatchSource(Protocol):
    """Batches as a function of the step, which is what makes resuming exact."""

    def batch(self, step: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same during a run: the compiled functions and the frozen part."""

    step: Callable
    evaluate: Callable
    frozen: Model
    rate: Callable
    batches: BatchSource
    held_out: Iterable[Batch] | None
    place: Callable[[Batch], Batch]


def fit(
    model: Model,
    batches: BatchSource,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    loss: Loss | None = None,
    rate: optax.Schedule | None = None,
    trainable: Callable[[str, Any], bool] | None = None,
    held_out: Iterable[Batch] | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    folder: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    accumulate: int = 1,
    clip: float | None = 1.0,
    policy=None,
    spikes: SpikeRule | None = SpikeRule(),
    place: Callable[[Batch], Batch] | None = None,
    progress: bool = True,
) -> tuple[Model, list[dict]]:
    """Train a model; returns it with the log (one row per step).

    With a folder, rows go to ``metrics.jsonl`` and states to ``checkpoints/``; called
    again it goes on from the newest state and ends with bitwise the parameters of an
    uninterrupted run, because batches and keys are functions of the step. An
    interrupt (Ctrl-C, SIGTERM) ends the step, saves, and raises.

    Args:
      model: Not changed. Its trainable part becomes float32.
      batches: ``batches.batch(step)``, such as ``jaxllm.data.loader.Batches``.
      optimizer: As from ``train.optimizers.optimizer``.
      steps: Total number of steps, resumed ones included.
      loss: Default ``next_token()``.
      rate: The schedule, for the log alone.
      trainable: ``(path, leaf) -> bool``; default everything floating-point.
      held_out: Batches of the evaluation, every ``eval_every`` steps and at the end.
      save_every: Steps between resume points (0: only at the end).
      resume: False refuses a folder that already holds a run.
      place: Puts a batch where it belongs, such as ``shard_rows(mesh)``.
      accumulate, clip, policy, spikes: See ``make_step``.

    Raises:
      ValueError: steps below 1, or a folder of another run.
      KeyboardInterrupt, SystemExit: Interrupted, after saving.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more")
    loss = loss or next_token()
    mine, frozen = split_model(model, trainable)
    state = initial_state(mine, optimizer, seed)
    run = Run(
        step=make_step(
            loss, optimizer, accumulate=accumulate, clip=clip, policy=policy, spikes=spikes
        ),
        evaluate=make_evaluation(loss, policy),
        frozen=frozen,
        rate=rate or (lambda step: float("nan")),
        batches=batches,
        held_out=held_out,
        place=place or (lambda batch: batch),
    )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interruptible())
        points, log = None, Log(None)
        if folder is not None:
            points = stack.enter_context(_points(Path(folder), resume))
            state = points.restore(state) or state
            log = stack.enter_context(Log(Path(folder) / "metrics.jsonl"))
        log.cut(int(state.step))
        bar = tqdm(total=steps, initial=int(state.step), disable=not progress)
        bar = stack.enter_context(bar)
        every = eval_every or steps, save_every or steps
        state = _steps(run, state, steps, every, points, log, bar, stop)
    return combine(state.params, frozen), log.rows


def _steps(
    run: Run, state: State, steps: int, every, points, log: Log, bar, stop
) -> State:
    eval_every, save_every = every
    at = int(state.step)
    while at < steps:
        start = time.perf_counter()
        batch = run.place(run.batches.batch(at))
        rate = float(run.rate(at - int(state.guard.skipped)))
        state, metrics = run.step(state, run.frozen, batch)
        row = {"step": at + 1, "loss": float(metrics.loss), "lr": rate}
        seconds = time.perf_counter() - start
        row |= {
            "norm": float(metrics.norm),
            "tokens": int(metrics.tokens),
            "tokens_per_second": round(batch.tokens.size / seconds, 1),
            "skipped": int(metrics.skipped),
        }
        at += 1
        if run.held_out is not None and (at % eval_every == 0 or at == steps):
            row["eval_loss"] = evaluate(run, state)
        log.add(row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        bar.update()
        if points and (at % save_every == 0 or at == steps or stop.signal):
            points.save(state)
        if stop.signal and at < steps:
            stop.leave(at)
    return state


def evaluate(run: Run, state: State) -> float:
    """Mean loss on the held-out batches, nats per target token."""
    pairs = [
        run.evaluate(state.params, run.frozen, run.place(batch))
        for batch in run.held_out
    ]
    total, weight = (sum(map(float, column)) for column in zip(*pairs, strict=True))
    return total / weight


def shard_rows(mesh: jax.sharding.Mesh, axis: str = "data") -> Callable[[Batch], Batch]:
    """Places the rows of a batch over one axis of a mesh (data parallelism).

    With parameters replicated over the same mesh, ``jit`` inserts the reductions.
    """
    spec = jax.sharding.PartitionSpec(axis)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return lambda batch: jax.device_put(batch, sharding)


class Log:
    """Rows of metrics, in memory and (with a path) as JSON lines; a context manager."""

    def __init__(self, path: Path | None):
        self.rows: list[dict] = []
        self._path, self._file = path, None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *reason) -> None:
        if self._file is not None:
            self._file.close()

    def cut(self, step: int) -> None:
        """Go on after ``step``: what an interrupted run logged beyond it is dropped."""
        if self._path is None:
            return
        if self._path.exists():
            with self._path.open() as file:
                rows = [json.loads(line) for line in file if line.endswith("\n")]
            self.rows = [row for row in rows if row["step"] <= step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        part.replace(self._path)
        self._file = self._path.open("a")

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


class Stop:
    """Which signal asked the run to end, if one did."""

    signal: int | None = None

    def leave(self, step: int) -> None:
        message = f"stopped after step {step}; run it again to go on"
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + self.signal)


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of dying; a second signal acts as usual.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = signal.SIGINT, signal.SIGTERM
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(kind, frame):
        stop.signal = kind
        for each, handler in before.items():
            signal.signal(each, handler)

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _points(folder: Path, resume: bool) -> ResumePoints:
    folder.mkdir(parents=True, exist_ok=True)
    points = ResumePoints(folder / "checkpoints")
    if not resume and points.latest is not None:
        points.__exit__()
        raise ValueError(
            f"{folder} already holds a run, at step {points.latest}; "
            "resume it, or use another folder"
        )
    return points
