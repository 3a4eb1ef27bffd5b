"""The training loop: batches in, model out; resumable, observable, interruptible."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import optax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxllm.core.batch import Batch
from jaxllm.core.model import Model, combine
from jaxllm.train.losses import Loss, next_token
from jaxllm.train.parallel import replicate, shard_rows
from jaxllm.train.record import Log, Stop, interruptible
from jaxllm.train.saving import ResumePoints
from jaxllm.train.state import State, initial_state, split_model
from jaxllm.train.step import USUAL, SpikeRule, make_evaluation, make_step


class BatchSource(Protocol):
    """Batches as a function of the step, which is what makes resuming exact."""

    def batch(self, step: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same during a run: the compiled functions and the frozen part."""

    step: Callable
    evaluate: Callable
    frozen: Model
    batches: BatchSource
    held_out: Iterable[Batch] | None
    eval_every: int
    save_every: int
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
    spikes: SpikeRule | None = USUAL,
    mesh: Mesh | None = None,
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
      mesh: Rows of a batch are split over its "data" axis; parameters that are not
        laid out on a mesh are replicated over it (data parallelism). Its axes are
        taken as automatic: the compiler finds the reductions.
      accumulate, clip, policy, spikes: See ``make_step``.

    Raises:
      ValueError: steps below 1, or a folder of another run.
      KeyboardInterrupt, SystemExit: Interrupted, after saving.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more")
    loss = loss or next_token()
    mine, frozen = split_model(model, trainable)
    if mesh is not None:
        mesh = Mesh(mesh.devices, mesh.axis_names)
        mine, frozen = (replicate(part, mesh) for part in (mine, frozen))
    state = initial_state(mine, optimizer, seed)
    if mesh is not None:
        state = replicate(state, mesh)
    options = dict(accumulate=accumulate, clip=clip, policy=policy, spikes=spikes)
    run = Run(
        step=make_step(loss, optimizer, **options),
        evaluate=make_evaluation(loss, policy),
        frozen=frozen,
        batches=batches,
        held_out=held_out,
        eval_every=eval_every or steps,
        save_every=save_every or steps,
        place=shard_rows(mesh) if mesh is not None else _as_it_is,
    )
    state, rows = _recorded(run, state, steps, folder, resume, rate, progress)
    return combine(state.params, frozen), rows


def _recorded(
    run: Run, state: State, steps: int, folder, resume: bool, rate, progress: bool
) -> tuple[State, list[dict]]:
    """Run the steps that are left, with log, resume points and signals around them."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interruptible())
        points = path = None
        if folder is not None:
            points = stack.enter_context(_points(Path(folder), resume))
            state = points.restore(state) or state
            path = Path(folder) / "metrics.jsonl"
        done = int(state.step)
        if done > steps:
            raise ValueError(
                f"{folder} holds a run at step {done}, beyond the {steps} steps wanted"
            )
        bar = tqdm(total=steps, initial=done, disable=not progress)
        bar = stack.enter_context(bar)
        log = stack.enter_context(Log(path, rate, bar))
        log.cut(done)
        return _steps(run, state, steps, points, log, stop), log.rows


def _steps(
    run: Run,
    state: State,
    steps: int,
    points: ResumePoints | None,
    log: Log,
    stop: Stop,
) -> State:
    at = int(state.step)
    log.go_on()
    while at < steps:
        batch = run.place(run.batches.batch(at))
        state, metrics = run.step(state, run.frozen, batch)
        at += 1
        log.push(at, metrics, batch.tokens.size)
        last, stopped = at == steps, stop.signal is not None
        judge = run.held_out is not None and (last or at % run.eval_every == 0)
        save = points is not None and (last or stopped or at % run.save_every == 0)
        if judge or save:
            log.pause()
            log.flush(**({"eval_loss": evaluate(run, state)} if judge else {}))
            if save:
                points.save(state)
            log.go_on()
        if stopped and not last:
            stop.leave(at, saved=points is not None)
    log.flush()
    return state


def evaluate(run: Run, state: State) -> float:
    """Mean loss on the held-out batches, nats per target token."""
    pairs = [
        run.evaluate(state.params, run.frozen, run.place(batch))
        for batch in run.held_out
    ]
    total, weight = (sum(map(float, column)) for column in zip(*pairs, strict=True))
    return total / weight


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


def _as_it_is(batch: Batch) -> Batch:
    return batch
