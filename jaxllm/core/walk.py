"""The walk: the only layer-by-layer loop over a model outside the forward pass.

Calibration batches move through the model block by block. For each block the
statistics of every linear input are collected under the already changed prefix, the
block is visited, and its outputs are computed anew. Methods never see any of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.core.arrays import traced
from jaxllm.core.batch import Batch
from jaxllm.core.model import Model, Params, get, put
from jaxllm.core.stats import Drift, Samples, Stats


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a visit sees of a block besides the parameters.

    ``stats`` by the full path of the tap; ``inputs``: per batch, the hidden states in
    front of the block and (positions, segments, weights); ``exact``: the same of the
    unchanged model, where the walk carries them; ``block`` is the block's static
    definition (None for the head). ``record`` adds to the monitor's event.
    """

    stats: dict[str, Stats]
    block: Any = None
    inputs: tuple = ()
    exact: tuple = ()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self, **values) -> None:
        self.notes.update(values)

    def taps(self, params: Params) -> list[dict[str, Samples]]:
        """Per batch, what each linear map of the block with ``params`` reads."""
        return [inputs_of(self.block, params, *item) for item in self.inputs]


Visit = Callable[[Params, str, Seen], Params]


@runtime_checkable
class Store(Protocol):
    """Where resume points go: ``load`` gives what ``save`` put there, or None."""

    def load(self, name: str) -> Any: ...
    def save(self, name: str, tree: Any) -> None: ...


@dataclasses.dataclass
class Monitor:
    """What watches a long computation: progress on the terminal, resume points, notes.

    ``events`` collects one dictionary per visited block (path, seconds, errors).
    ``offload`` keeps the hidden states of other batches on the host.
    """

    progress: bool = True
    store: Store | None = None
    offload: bool = False
    events: list[dict] = dataclasses.field(default_factory=list)

    def note(self, event: dict) -> None:
        """Keep an event, less ``error_last``: a last loss that is no number is told."""
        last = event.get("error_last", 0.0)
        self.events.append({k: v for k, v in event.items() if k != "error_last"})
        if not math.isfinite(last):
            says = f"{event['step']} at {event['path']}: the loss diverged"
            warnings.warn(f"{says}; the best state before is kept", stacklevel=2)

    def track(self, items: Iterable, label: str, total: int) -> Iterable:
        """A progress bar that appears when the work takes over two seconds."""
        bar = dict(desc=label, total=total, leave=False, delay=2.0)
        return tqdm(items, **bar) if self.progress else items

    def scoped(self, name: str) -> Monitor:
        """The same monitor with resume points below ``name``; events are shared."""
        store = None if self.store is None else _Scoped(self.store, name)
        return dataclasses.replace(self, store=store, events=self.events)


@dataclasses.dataclass(frozen=True)
class _Scoped:
    inner: Store
    name: str

    def load(self, name: str):
        return self.inner.load(f"{self.name}/{name}")

    def save(self, name: str, tree) -> None:
        self.inner.save(f"{self.name}/{name}", tree)


def walk(
    model: Model,
    batches: Iterable[Batch] | None,
    needs: tuple[str, ...],
    visit: Visit,
    *,
    label: str = "walk",
    monitor: Monitor | None = None,
    wants: Callable[[str], bool] = lambda path: True,
    inputs: bool = False,
    exact: bool = False,
) -> Model:
    """Visit every block in order and return the model with the new parameters.

    ``visit(params, path, seen)`` gets the whole parameters, the block's path and what
    was ``Seen`` of it, and returns the parameters with that block changed; blocks for
    which ``wants(path)`` is false are passed through. Without ``needs`` (or
    ``inputs``) nothing runs forward and ``batches`` is not read. ``exact`` carries the
    hidden states of the unchanged model along.
    """
    monitor = monitor or Monitor(progress=False)
    config, params = model.config, model.params
    forward = bool(needs) or inputs or exact
    states = _Hidden(config, params, batches if forward else (), monitor.offload)
    dense = None
    if exact or "drift" in needs:
        dense = _Hidden(config, params, batches, monitor.offload)
    blocks = config.blocks()
    last = max((i for i, (path, _) in enumerate(blocks) if wants(path)), default=-1)
    for i, (path, block) in enumerate(monitor.track(blocks, label, len(blocks))):
        if wants(path):
            start = time.perf_counter()
            notes: dict[str, Any] = {}

            def make(params, path=path, block=block, notes=notes):
                stats = states.collect(block, get(params, path), path, needs, dense)
                own = () if dense is None else dense.items
                return visit(params, path, Seen(stats, block, states.items, own, notes))

            params = _resumed(params, path, monitor, make)
            _note(monitor, dict(step=label, path=path), start, params, notes)
        if i < last or (forward and wants(config.head_path)):
            states.advance(block, get(params, path))
            if dense is not None:
                dense.advance(block, get(model.params, path))
    if wants(config.head_path):
        seen = Seen(states.final(config, params, needs))
        params = visit(params, config.head_path, seen)
    return model.replace(params=params)


def _resumed(params: Params, path: str, monitor: Monitor, make) -> Params:
    """The block from its resume point, else computed and saved there.

    A visit may change the block only: what it folds, it folds inside the block.
    """
    if monitor.store is not None:
        found = monitor.store.load(path)
        if found is not None:
            return put(params, path, found)
    params = make(params)
    if monitor.store is not None:
        monitor.store.save(path, get(params, path))
    return params


def _note(monitor: Monitor, event: dict, start: float, params, notes: dict) -> None:
    """One event: where, how long, and what the visit recorded."""
    leaves = jax.tree.leaves(get(params, event["path"]))
    if traced(leaves):
        return
    jax.block_until_ready(leaves)
    seconds = round(time.perf_counter() - start, 4)
    notes = {k: float(v) for k, v in notes.items()}
    monitor.note(event | dict(seconds=seconds) | notes)


class _Hidden:
    """The hidden states of all calibration batches in front of the current block."""

    def __init__(self, config, params, batches, offload: bool):
        self.offload = offload
        items = []
        for batch in batches:
            positions = batch.positions
            if positions is None:
                steps = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
                positions = jnp.broadcast_to(steps, batch.tokens.shape)
            hidden = _embed(config, _embedding(params), batch.tokens, positions)
            rest = (positions, batch.segments, batch.weights)
            items.append((self._kept(hidden), rest))
        self.items = tuple(items)

    def _kept(self, hidden):
        return np.asarray(hidden) if self.offload else hidden

    def collect(self, block, params, path, needs, dense=None) -> dict[str, Stats]:
        """Sums over all batches, by the full path of the tap.

        ``dense`` are the hidden states of the unchanged model, for drifts.
        """
        total: dict[str, Stats] = {}
        exact = dense.items if dense is not None else self.items
        for (hidden, rest), (other, _) in zip(
            self.items if needs else (), exact if needs else (), strict=True
        ):
            total = _collect(block, needs, params, hidden, other, *rest, total)
        return {f"{path}.{tap}": found for tap, found in total.items()}

    def final(self, config, params, needs) -> dict[str, Stats]:
        """Statistics of the head's input."""
        norm = {k: v for k, v in params.items() if k == "norm"}
        found = [
            _final(config, needs, norm, hidden, rest[2]) for hidden, rest in self.items
        ]
        return {"final": functools.reduce(Stats.__add__, found)} if found else {}

    def advance(self, block, params) -> None:
        self.items = tuple(
            (self._kept(_forward(block, params, hidden, *rest)), rest)
            for hidden, rest in self.items
        )


def _embedding(params: Params) -> Params:
    return {k: v for k, v in params.items() if k in ("embed", "positions")}


@functools.partial(jax.jit, static_argnums=0)
def _embed(config, params, tokens, positions):
    return config.embed(params, tokens, positions)


def inputs_of(block, params: Params, hidden, rest) -> dict[str, Samples]:
    """What each linear map of a block reads, of one batch, by local tap."""
    found = _collect(block, ("samples",), params, hidden, hidden, *rest, {})
    return {tap: stats.samples for tap, stats in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _collect(block, needs, params, hidden, dense, positions, segments, weights, total):
    """``total`` (empty at first) plus the statistics of one batch, by tap.

    The block is still unchanged here: its drift comes from its hidden states alone.
    """
    drifts = "drift" in needs
    needs = tuple("samples" if n == "drift" else n for n in needs)
    taps = lambda h, needs: dict(  # noqa: E731
        _flatten(block.run(params, h, positions, segments, weights, needs)[1], "")
    )
    found = taps(hidden, needs)
    if drifts:
        exact = taps(dense, ("samples",))
        found = {tap: _drifted(s, exact[tap]) for tap, s in found.items()}
    return {tap: total[tap] + s if total else s for tap, s in found.items()}


def _drifted(found: Stats, exact: Stats) -> Stats:
    """The statistics with the drift of the samples in place of the samples.

    Experts (leading axis) get none: the streams send other tokens to them.
    """
    rest = {n: s for n, s in found.items.items() if n != "samples"}
    other = found if found.samples.x.ndim > 2 else exact
    return Stats({**rest, "drift": Drift.between(found.samples, other.samples)})


@functools.partial(jax.jit, static_argnums=0)
def _forward(block, params, hidden, positions, segments, weights):
    return block.run(params, hidden, positions, segments, weights)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _final(config, needs, norm, hidden, weights):
    return Stats.of(needs, config.final(norm, hidden), weights)


def _flatten(tree, prefix: str):
    for name, node in tree.items():
        if isinstance(node, Stats):
            yield f"{prefix}{name}", node
        else:
            yield from _flatten(node, f"{prefix}{name}.")
