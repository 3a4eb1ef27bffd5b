"""Which tensor of a checkpoint holds which parameter, compiled from the name tables."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator

import jax
import numpy as np

from jaxllm.core.model import named_leaves
from jaxllm.models.config import MoE
from jaxllm.models.hub.families import FAMILIES
from jaxllm.models.hub.names import BUFFERS, PREFIXES, Module
from jaxllm.models.transformer import Transformer, init

LEAVES = {"weight": "weight", "scale": "weight", "table": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs: the parameters that are its parts, and how they lie in it.

    ``expert`` selects a slice of stacked parameters, whose ``shapes`` are without the
    expert axis; ``head_dim`` is that of the ``heads`` layout.
    """

    theirs: str
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: str
    head_dim: int
    expert: int | None = None

    @property
    def transposed(self) -> bool:
        return self.layout != "conv" and self.parts[0].endswith(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        *lead, _ = self.shapes[0]
        shape = (*lead, sum(s[-1] for s in self.shapes))
        return shape[::-1] if self.transposed else shape

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parts of a tensor, as views."""
        return self.unfused(tensor.swapaxes(-1, -2) if self.transposed else tensor)

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor of its parts (inverse of ``split``)."""
        x = self.fused(parts)
        return x.swapaxes(-1, -2) if self.transposed else x

    def unfused(self, x: np.ndarray) -> list[np.ndarray]:
        """The parts of an array whose last axis is out."""
        if self.layout == "heads":
            lead, count = x.shape[:-1], len(self.parts)
            x = x.reshape(*lead, -1, count, self.head_dim)
            return [x[..., i, :].reshape(*lead, -1) for i in range(count)]
        ends = np.cumsum([s[-1] for s in self.shapes])[:-1]
        return np.split(x, ends, -1)

    def fused(self, parts: list[np.ndarray]) -> np.ndarray:
        """Arrays whose last axis is out, as one (inverse of ``unfused``)."""
        if self.layout == "heads":
            heads = [x.reshape(*x.shape[:-1], -1, self.head_dim) for x in parts]
            return np.stack(heads, -2).reshape(*parts[0].shape[:-1], -1)
        return np.concatenate(parts, -1)


def parameter_shapes(config: Transformer) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that the configuration has, by leaf path."""
    model = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in named_leaves(model.params).items()}


def make_plan(
    config: Transformer, modules: tuple[Module, ...] | None = None
) -> dict[str, Entry]:
    """All tensors of a checkpoint of this architecture, by their names.

    ``modules`` are other names than the family's own.

    Raises ``ValueError`` when there is no name for a parameter.
    """
    shapes = parameter_shapes(config)
    modules = FAMILIES[config.family].modules if modules is None else modules
    plan = {e.theirs: e for m in modules for e in _entries(m, config, shapes)}
    held = {part for entry in plan.values() for part in entry.parts}
    if missing := sorted(set(shapes) - held):
        raise ValueError(f"{config.family} has no name for parameter {missing[0]!r}")
    return plan


def _entries(module: Module, config: Transformer, shapes) -> Iterator[Entry]:
    for i in range(len(config.layers) if "{i}" in module.theirs else 1):
        layer = config.layers[i]
        experts = layer.ffn.experts if isinstance(layer.ffn, MoE) else 0
        head_dim = layer.attention.head_dim if layer.attention else 1
        for leaf, theirs in LEAVES.items():
            parts = tuple(f"{p.format(i=i)}.{leaf}" for p in module.ours)
            if parts[0] not in shapes:
                continue
            found = tuple(shapes[p] for p in parts)
            if "{e}" not in module.theirs:
                name = f"{module.theirs.format(i=i)}.{theirs}"
                yield Entry(name, parts, found, module.layout, head_dim)
                continue
            found = tuple(s[1:] for s in found)
            for e in range(experts):
                name = f"{module.theirs.format(i=i, e=e)}.{theirs}"
                yield Entry(name, parts, found, module.layout, head_dim, e)


def match(names, plan: dict[str, Entry], config: Transformer) -> dict[str, str | None]:
    """The plan's name for each tensor of a checkpoint; None for what is not needed.

    A prefix of the bare model may be absent. Buffers that are recomputed, and the
    head of a tied model (checked elsewhere), are not needed.

    Raises ``ValueError`` for a tensor that the architecture does not have, and for
    one that is missing.
    """
    head = tied_head(config)
    found: dict[str, str | None] = {}
    for name in names:
        spellings = (name, *(prefix + name for prefix in PREFIXES))
        known = next((s for s in spellings if s in plan), None)
        buffer = any(fnmatch.fnmatchcase(name, pattern) for pattern in BUFFERS)
        if known is None and not buffer and name != head:
            raise ValueError(f"unexpected tensor {name!r} for a {config.family}")
        found[name] = known
    if missing := sorted(set(plan) - set(found.values())):
        raise ValueError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    return found


def tied_head(config: Transformer) -> str | None:
    """The name under which a checkpoint may repeat a tied embedding."""
    modules = FAMILIES[config.family].modules
    name = next(m.theirs for m in modules if m.ours == ("head",))
    return f"{name}.weight" if config.tied else None
