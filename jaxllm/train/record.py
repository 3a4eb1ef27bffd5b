"""What a run leaves behind while it runs, and how it is told to stop."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from jaxllm.train.step import Metrics


class Log:
    """Rows of metrics, in memory and (with a path) as JSON lines; a context manager.

    A step's numbers are read once the next step is under way, so that reading them
    does not leave the device idle.
    """

    def __init__(self, path: Path | None, rate: Callable | None, bar: tqdm):
        self.rows: list[dict] = []
        self._path, self._file = path, None
        self._rate, self._bar = rate, bar
        self._open: tuple[int, Metrics, int] | None = None
        self._since, self._until = time.perf_counter(), None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *reason) -> None:
        if self._file is not None:
            self._file.close()

    def push(self, step: int, metrics: Metrics, size: int) -> None:
        """Take the metrics of a step on ``size`` tokens; write the step before it."""
        before, self._open = self._open, (step, metrics, size)
        if before is not None:
            self._row(*before)

    def flush(self, **more: float) -> None:
        """Write the last step now, with more numbers."""
        if self._open is not None:
            self._row(*self._open, **more)
        self._open = None

    def pause(self) -> None:
        """Stop the clock once the last step is done: what follows is no training."""
        if self._open is not None:
            jax.block_until_ready(self._open[1])
        self._until = time.perf_counter()

    def go_on(self) -> None:
        """Start the clock again."""
        self._since, self._until = time.perf_counter(), None

    def _row(self, step: int, metrics: Metrics, size: int, **more: float) -> None:
        row = {
            "step": step,
            "loss": _finite(metrics.loss),
            "norm": _finite(metrics.norm),
            "tokens": int(metrics.tokens),
            "skipped": int(metrics.skipped),
        }
        if self._rate is not None:
            row["lr"] = float(self._rate(int(metrics.updates)))
        now = self._until or time.perf_counter()
        row["tokens_per_second"] = round(size / (now - self._since), 1)
        self._since = now
        self._write(row | more)
        self._bar.set_postfix(loss=f"{float(metrics.loss):.3f}", refresh=False)
        self._bar.update()

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

    def _write(self, row: dict) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def _finite(value) -> float | None:
    """A number that JSON knows: ``None`` for a loss of a step that went wrong."""
    return float(value) if math.isfinite(value) else None


class Stop:
    """Which signal asked the run to end, if one did."""

    signal: int | None = None

    def leave(self, step: int, saved: bool) -> None:
        """End the run as the signal would have."""
        hint = "saved: run it again to go on" if saved else "nothing was saved"
        message = f"stopped after step {step}, {hint}"
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
