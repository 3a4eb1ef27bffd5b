"""Arrays by path through Orbax, with a hash of each leaf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.core.structure import SEPARATOR

FOLDER = "arrays"
Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


def write(folder, leaves: Mapping[str, Any]) -> None:
    """Store arrays by path below ``folder/arrays`` as nested dictionaries."""
    import orbax.checkpoint as ocp

    if not leaves:
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / FOLDER, nest(leaves))


def read(folder, shapes: Mapping[str, jax.ShapeDtypeStruct], sharding: Sharding):
    """The arrays by path, each placed as ``sharding(path, shape)`` says.

    Raises:
      ValueError: The arrays cannot be read or are not those of the manifest.
    """
    import orbax.checkpoint as ocp

    if not shapes:
        return {}
    placed = {
        path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(path, s))
        for path, s in shapes.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = flatten(checkpointer.restore(folder / FOLDER, nest(placed)))
    except Exception as error:  # Orbax and TensorStore raise many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"the arrays below {folder} cannot be read: {reason}"
        raise ValueError(message) from error
    return {path: found[path] for path in shapes}


def digest(leaf) -> str | None:
    """16 hex digits of a leaf's bytes; None where other hosts hold a part of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return None
    values = np.ascontiguousarray(np.asarray(leaf)).reshape(-1)
    return hashlib.sha256(values.view(np.uint8)).hexdigest()[:16]


def check(leaves: Mapping[str, Any], digests: Mapping[str, str | None], uri) -> None:
    """Raise ``ValueError`` naming the first leaf whose bytes have changed."""
    for path, leaf in leaves.items():
        found = digest(leaf)
        if None not in (found, digests[path]) and found != digests[path]:
            raise ValueError(
                f"{uri!s} is damaged: leaf {path!r} has checksum {found}, the manifest "
                f"says {digests[path]}"
            )


def nest(flat: Mapping[str, Any]) -> dict:
    """Nested dictionaries of paths.

    >>> nest({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict = {}
    for path, value in flat.items():
        *folders, name = path.split(SEPARATOR)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """The inverse of ``nest``."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        nested = isinstance(value, Mapping)
        flat |= flatten(value, path + SEPARATOR) if nested else {path: value}
    return flat
