"""Sharding rules: logical axis names of leaves to axes of a device mesh.

Every weight type names the axes of its leaves (``axes``), so that packed codes,
scales and factors are split like the dense array that they stand for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.core.compat import make_mesh as _make_mesh
from jaxllm.core.model import Model
from jaxllm.core.weights import Weight

# Tensor parallelism: heads, hidden channels and vocabulary; ``embed`` stays whole.
RULES: Mapping[str, str] = {
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
}


def make_mesh(**axes: int) -> Mesh:
    """A mesh with the given axes: ``make_mesh(data=4, tensor=2)``.

    Raises ``ValueError`` when there are fewer devices than the product.
    """
    count, here = int(np.prod([*axes.values()])), len(jax.devices())
    if count > here:
        raise ValueError(f"a mesh {axes} needs {count} devices; there are {here}")
    return _make_mesh(tuple(axes.values()), tuple(axes))


def shardings(model: Model, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Model:
    """A model whose leaves are the ``NamedSharding`` of each leaf.

    A leaf whose dimension does not divide stays whole on every device; what that
    costs is warned about once per model.
    """
    whole: list[str] = []
    params = _tree(model, model.params, "", mesh, rules, whole)
    if whole:
        on = f"{dict(mesh.shape)}: {whole[:3]}"
        warnings.warn(f"{len(whole)} weights cannot be split on {on}", stacklevel=2)
    return model.replace(params=params)


def place(model: Model, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Model:
    """The model on the mesh."""
    return jax.device_put(model, shardings(model, mesh, rules))


def _tree(model: Model, node, path: str, mesh, rules, whole) -> Any:
    if not isinstance(node, dict):
        return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), node)
    out = {}
    for name, child in node.items():
        if name == "weight" and path:
            out[name] = _weight(model, child, path, mesh, rules, whole)
        elif name == "bias" and path and not path.endswith("norm"):
            names = model.config.axes(path)[1:]
            out[name] = _sharding(child, names, path, mesh, rules, whole)
        else:
            below = f"{path}.{name}" if path else name
            out[name] = _tree(model, child, below, mesh, rules, whole)
    return out


def _weight(model: Model, w, path: str, mesh, rules, whole):
    names = model.config.axes(path)
    if not isinstance(w, Weight):
        return _sharding(w, names, path, mesh, rules, whole)
    named = w.axes(names)

    def is_names(x) -> bool:
        return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)

    leaves = jax.tree.leaves(named, is_leaf=is_names)
    arrays, tree = jax.tree.flatten(w)
    pairs = zip(arrays, leaves, strict=True)
    return tree.unflatten(_sharding(a, n, path, mesh, rules, whole) for a, n in pairs)


def _sharding(leaf, names, path: str, mesh, rules, whole) -> NamedSharding:
    """Leading axes (experts) come before the named ones."""
    lead = leaf.ndim - len(names)
    names = ("expert",) * lead + tuple(names)
    spec = []
    for size, name in zip(leaf.shape, names, strict=True):
        axis = rules.get(name) if name else None
        axis = axis if axis in mesh.shape and mesh.shape[axis] > 1 else None
        if axis is not None and size % mesh.shape[axis]:
            axis = None
            whole.append(path)
        spec.append(axis if axis not in spec else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
