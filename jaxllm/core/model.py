"""Model: one frozen pytree, and the protocol that architectures implement."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """Where a model came from (``origin``, a URI) and the transforms that made it.

    It compares equal to every other history, so that two models that differ only in
    how they were made share one trace and one tree structure. Jitted code never
    reads it.
    """

    specs: tuple = ()
    origin: str | None = None

    def __eq__(self, other) -> bool:
        return isinstance(other, History)

    def __hash__(self) -> int:
        return 0

    def __add__(self, spec) -> History:
        return History((*self.specs, spec), self.origin)


@dataclasses.dataclass(frozen=True)
class Site:
    """Linear maps that share one input, and what produces that input.

    ``consumers`` are weight paths; ``tap`` names the shared input among collected
    statistics. ``producer`` is the path of the norm or weight whose output channels
    are that input (``None``: nothing linear produces it). ``kind`` is ``norm``,
    ``norm_plus_one`` (scale stored as 1 + w) or ``linear``. ``repeat`` and
    ``head_dim`` give the channel map of grouped-query attention: input channel
    ``(h, d)`` of the consumers is output channel ``(h // repeat, d)`` of the
    producer. ``exclusive`` is false when the producer also feeds something else.
    """

    consumers: tuple[str, ...]
    tap: str
    producer: str | None = None
    kind: str = "linear"
    repeat: int = 1
    head_dim: int = 1
    exclusive: bool = True

    @property
    def kindred(self) -> Site:
        """The site without its place, equal for the same part of every layer.

        What is compiled for it serves all of them.
        """
        producer = None if self.producer is None else ""
        return dataclasses.replace(self, consumers=(), tap="", producer=producer)


@dataclasses.dataclass(frozen=True)
class Residual:
    """The residual stream: who reads it (after which norm) and who writes to it.

    A reader is (path of its norm or None, all weights that the norm feeds); ``kinds``
    has the norm's kind for each reader: ``rms``, ``rms_plus_one``, ``layer`` (subtracts
    the mean, adds a bias) or None. ``post_norms`` has for each writer the path of the
    norm between it and the stream, or None where it writes directly: what follows a
    norm cannot be folded into the writer. ``embed`` and ``positions`` (a learned
    position table [rows, width], or None) write the stream's first state.
    """

    readers: tuple[tuple[str | None, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    embed: str = "embed"
    positions: str | None = None
    kinds: tuple[str | None, ...] = ()
    post_norms: tuple[str | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Units:
    """Channels that exist together, so that they can only be removed together.

    A unit is a channel of a feed-forward layer, or the query heads of one key-value
    head. ``path`` is the part they belong to, ``count`` how many it has. The output
    channels of ``outputs`` and the input channels of ``input`` are ``count`` equal
    runs, one per unit; ``tap`` names the statistics of ``input``. ``kind`` is
    ``heads`` or ``channels``.
    """

    path: str
    kind: str
    count: int
    outputs: tuple[str, ...]
    input: str
    tap: str


class Architecture(Protocol):
    """What ``Model.config`` implements: hashable, and pure in its parameters.

    ``blocks()`` gives, in order, the path of each block and its static definition
    (equal definitions share one compilation; no layer index is in them).
    """

    def embed(self, params: Params, tokens, positions=None) -> jax.Array: ...
    def blocks(self) -> tuple[tuple[str, Any], ...]: ...
    def final(self, params: Params, hidden) -> jax.Array: ...
    def head(self, params: Params, hidden) -> jax.Array: ...
    def sites(self) -> tuple[Site, ...]: ...
    def residual(self) -> Residual: ...
    def units(self) -> tuple[Units, ...]: ...
    def with_units(self, counts: dict[str, int]) -> Architecture: ...
    def with_width(self, width: int) -> Architecture: ...
    def with_layers(self, kept: tuple[int, ...]) -> Architecture: ...
    @property
    def head_path(self) -> str: ...
    def linears(self) -> tuple[str, ...]: ...
    def untied(self) -> Architecture: ...
    def with_cache(self, format, rotate_qk: bool) -> Architecture: ...
    def with_probabilities(self, format) -> Architecture: ...
    def with_tokens(self, rules: dict[str, Any]) -> Architecture: ...
    def axes(self, path: str) -> tuple[str, str]: ...
    def forward(self, params: Params, tokens, **values): ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters (data) with their architecture and history (static).

    ``model(tokens)`` gives float32 logits ``[batch, length, vocabulary]`` and is
    pure; a model passes through ``jit``, ``grad``, ``eval_shape``, ``device_put``
    and checkpoints like any pytree.
    """

    params: Params
    config: Any = dataclasses.field(metadata=dict(static=True))
    history: History = dataclasses.field(default=History(), metadata=dict(static=True))

    def __call__(self, tokens, *, positions=None, segments=None, cache=None):
        """Logits, or ``(logits, cache)`` when a cache is given.

        ``tokens``, ``positions``, ``segments``: int32 ``[batch, length]``.
        """
        return self.config.forward(
            self.params, tokens, positions=positions, segments=segments, cache=cache
        )

    def replace(self, **changes) -> Model:
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        made = (self.history.origin or "dense", *map(repr, self.history.specs))
        return f"Model({type(self.config).__name__}, {' -> '.join(made)})"


def get(params: Params, path: str):
    """The subtree at a dotted path: ``get(params, "layers.0.attn.q")``."""
    node = params
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            raise KeyError(f"no parameter at {path!r}: {part!r} is missing")
        node = node[part]
    return node


def put(params: Params, path: str, value) -> Params:
    """A copy of ``params`` with the subtree at ``path`` replaced."""
    head, _, rest = path.partition(".")
    return params | {head: put(params.get(head, {}), rest, value) if rest else value}


def weight(model: Model, path: str):
    """The linear weight at a path: a plain array or a weight type, [in, out]."""
    return get(model.params, f"{path}.weight")


def with_weight(model: Model, path: str, value) -> Model:
    return model.replace(params=put(model.params, f"{path}.weight", value))


def with_weights(model: Model, ws: dict[str, Any]) -> Model:
    """The model with other weights at these paths."""
    for path, w in ws.items():
        model = with_weight(model, path, w)
    return model


def paths(params: Params, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all parameter groups (dictionaries that hold leaves)."""
    for name, node in params.items():
        path = f"{prefix}{name}"
        if isinstance(node, dict):
            if any(not isinstance(child, dict) for child in node.values()):
                yield path
            yield from paths(node, path + ".")


def select(candidates: tuple[str, ...], pattern: str | tuple[str, ...]):
    """The paths that a pattern names: ``layers.*.mlp`` covers all below it.

    Raises ``ValueError`` listing the nearest paths when nothing matches.
    """
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    chosen = tuple(p for p in candidates if any(_matches(p, q) for q in patterns))
    for q in patterns:
        if not any(_matches(p, q) for p in candidates):
            near = difflib.get_close_matches(q, candidates, n=3, cutoff=0.0)
            raise ValueError(f"{q!r} matches no weight; nearest: {', '.join(near)}")
    return chosen


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def dotted(path) -> str:
    """A key path of a pytree as text: ``layers.0.attn.q.weight``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """The leaves of a pytree by their dotted paths, in the tree's order."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
    return {dotted(path): leaf for path, leaf in flat}


def stable_hash(text: str) -> int:
    """A 31-bit hash that is equal in every process (FNV-1a)."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value & 0x7FFFFFFF


def layer_key(key: jax.Array, path: str) -> jax.Array:
    """The random key of a layer: it does not depend on order, subset or resume."""
    return jax.random.fold_in(key, stable_hash(path))


def check_finite(model: Model) -> None:
    """Raise ``ValueError`` naming the first parameter that is not finite."""
    for name, leaf in named_leaves(model.params).items():
        kind = np.dtype(leaf.dtype).kind
        if kind not in "iub" and not bool(
            np.isfinite(np.asarray(leaf, np.float32)).all()
        ):
            raise ValueError(f"parameter {name!r} has non-finite values")


def partition(model: Model, trainable: Callable[[str, Any], bool]):
    """Split a model into (trainable, frozen): trees with ``None`` where not theirs.

    ``trainable(path, leaf)`` decides per leaf; ``combine`` is the inverse.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(model)
    chosen = [trainable(dotted(p).removeprefix("params."), leaf) for p, leaf in flat]
    leaves = [leaf for _, leaf in flat]
    mine = [x if c else None for x, c in zip(leaves, chosen, strict=True)]
    rest = [None if c else x for x, c in zip(leaves, chosen, strict=True)]
    return jax.tree.unflatten(tree, mine), jax.tree.unflatten(tree, rest)


def combine(trainable: Model, frozen: Model) -> Model:
    """The whole model from its two parts (inverse of ``partition``)."""
    missing = lambda x: x is None  # noqa: E731
    pick = lambda a, b: b if a is None else a  # noqa: E731
    return jax.tree.map(pick, trainable, frozen, is_leaf=missing)
