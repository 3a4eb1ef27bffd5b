"""Trees that describe themselves: any pytree of weights as JSON data, and back.

``describe`` splits a tree of dicts, lists, tuples and registered dataclasses into
JSON data and a flat mapping of its arrays; ``build`` puts them together again. A
checkpoint that carries the description needs no code that recreates the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.spec import decode, encode, find_class

SEPARATOR = "/"
Leaves = dict[str, Any]


def describe(tree) -> tuple[dict, Leaves]:
    """JSON data of a tree's structure, and its arrays by path (``layers/0/...``).

    An array that occurs twice (a tied weight) is listed once. Dataclasses are named
    with their static fields through ``core.spec.encode``; numbers, strings and
    ``None`` stay in the data; typed random keys are stored as their words.

    >>> import numpy as np
    >>> data, leaves = describe({"w": (np.zeros((2, 3), "float32"), 1.5)})
    >>> data["dict"]["w"]["tuple"]
    [{'shape': [2, 3], 'dtype': 'float32'}, {'value': 1.5}]
    >>> list(leaves)
    ['w/0']

    Raises:
      TypeError: A node that is none of these (the path is named).
      ValueError: A dictionary key that is not a string without ``/``.
    """
    leaves: Leaves = {}
    seen: dict[int, str] = {}
    return _describe(tree, "", leaves, seen), leaves


MakeLeaf = Callable[[str, jax.ShapeDtypeStruct], Any]


def build(data: Mapping, leaf: MakeLeaf, resolve=None):
    """The tree that ``describe`` described, with ``leaf(path, abstract)`` as arrays.

    ``resolve`` finds makers by name where a static field holds an expression.
    """
    made: Leaves = {}
    return _build(data, "", leaf, made, resolve)


def abstract(data: Mapping, resolve=None):
    """The tree with ``jax.ShapeDtypeStruct`` leaves: shapes without memory."""
    return build(data, lambda path, shape: shape, resolve)


def leaf_shapes(data: Mapping, resolve=None) -> dict[str, jax.ShapeDtypeStruct]:
    """The stored arrays by path, each once."""
    found: dict[str, jax.ShapeDtypeStruct] = {}
    build(data, lambda path, shape: found.setdefault(path, shape), resolve)
    return found


def _join(path: str, name: object) -> str:
    return f"{path}{SEPARATOR}{name}" if path else str(name)


def _describe(node, path: str, leaves: Leaves, seen: dict[int, str]) -> dict:
    match node:
        case None | bool() | int() | float() | str():
            return {"value": node}
        case dict():
            return {"dict": _children(node, path, leaves, seen)}
        case list() | tuple() if type(node) in (list, tuple):
            named = dict(enumerate(node))
            children = _children(named, path, leaves, seen, any_key=True)
            return {type(node).__name__: [*children.values()]}
    if isinstance(node, type):
        pass
    elif dataclasses.is_dataclass(node):
        return _describe_dataclass(node, path, leaves, seen)
    elif hasattr(node, "shape") and hasattr(node, "dtype"):
        return _describe_leaf(node, path, leaves, seen)
    kind = f"{type(node).__module__}.{type(node).__qualname__}"
    raise TypeError(
        f"{path or 'the tree'} is a {kind}; accepted: arrays, numbers, strings, dicts, "
        "lists, tuples and registered dataclasses"
    )


def _children(items: Mapping, path, leaves, seen, any_key: bool = False) -> dict:
    for key in items:
        if not any_key and (not isinstance(key, str) or SEPARATOR in key or not key):
            raise ValueError(
                f"key {key!r} at {path or 'the top'}: expected a string without "
                f"{SEPARATOR!r}"
            )
    return {
        str(k): _describe(v, _join(path, k), leaves, seen) for k, v in items.items()
    }


def _describe_leaf(leaf, path: str, leaves: Leaves, seen: dict[int, str]) -> dict:
    if id(leaf) in seen:
        return {"same": seen[id(leaf)]}
    seen[id(leaf)] = path
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(leaf)
        leaves[path] = words
        implementation = str(jax.random.key_impl(leaf))
        return {**_shape(words), "key": implementation}
    leaves[path] = leaf
    return _shape(leaf)


def _shape(leaf) -> dict:
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}


def _describe_dataclass(node, path: str, leaves: Leaves, seen: dict[int, str]) -> dict:
    kind = type(node)
    name = f"{kind.__module__}.{kind.__qualname__}"
    find_class(name)  # what could not be loaded is not written
    data, static = {}, {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.metadata.get("static"):
            static[field.name] = encode(value)
        else:
            data[field.name] = _describe(value, _join(path, field.name), leaves, seen)
    return {"type": name, "data": data, "static": static}


def _build(data: Mapping, path: str, leaf, made: Leaves, resolve):
    def child(name, part):
        return _build(part, _join(path, name), leaf, made, resolve)

    match data:
        case {"value": value}:
            return value
        case {"same": first}:
            return made[first]
        case {"dict": items}:
            return {k: child(k, v) for k, v in items.items()}
        case {"list": items}:
            return [child(i, v) for i, v in enumerate(items)]
        case {"tuple": items}:
            return tuple(child(i, v) for i, v in enumerate(items))
        case {"type": name, "data": parts, "static": static}:
            fields = {k: child(k, v) for k, v in parts.items()}
            fixed = {k: decode(v, resolve) for k, v in static.items()}
            return find_class(name)(**fields, **fixed)
        case {"shape": shape, "dtype": dtype}:
            value = leaf(path, jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)))
            made[path] = _as_key(value, data["key"]) if "key" in data else value
            return made[path]
    raise ValueError(f"{path or 'the structure'} has the unknown form {data!r}")


def _as_key(words, implementation: str):
    """A typed key again; what is no array (a shape, a name) stays as it is."""
    if not isinstance(words, jax.Array | np.ndarray):
        return words
    return jax.random.wrap_key_data(jnp.asarray(words), impl=implementation)
