"""Data into frozen dataclasses: unknown keys and wrong types are errors with a path."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML with ``1e-4`` as a number, and without a second value for a key."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = [k for k, n in collections.Counter(map(str, keys)).items() if n > 1]
        if twice:
            line = node.start_mark.line + 1
            raise ValueError(f"key {twice[0]!r} occurs twice (mapping at line {line})")
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """The data of a YAML text; a syntax error names its line.

    >>> parse_yaml("rate: 1e-4", "here")
    {'rate': 0.0001}
    """
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{origin} is not valid YAML: {error}") from None


def read(kind: type, data: Any, path: str = ""):
    """A frozen dataclass from nested data.

    Raises:
      ValueError: An unknown key (with the nearest known one), or a missing one.
      TypeError: A value of another type than the field's.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{path or 'the file'}: expected a mapping, got {_show(data)}")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in data:
        if key not in fields:
            raise ValueError(unknown(join(path, key), key, fields))
    hints = typing.get_type_hints(kind)
    values = {k: convert(v, hints[k], join(path, k)) for k, v in data.items()}
    for name, field in fields.items():
        default = field.default, field.default_factory
        if name not in values and default == (dataclasses.MISSING,) * 2:
            raise ValueError(f"{join(path, name)}: missing, and it has no default")
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path or 'the file'}: {error}") from None


def unknown(path: str, key: str, known) -> str:
    """The message for a key that is not known, with the nearest that is."""
    near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{path}: unknown key {key!r}; {hint}accepted: {', '.join(known)}"


def join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint``, or an error that names both."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(value, args, path)
    if origin is tuple:
        return _items(value, args[0], path)
    if origin is typing.Literal:
        if value not in args:
            known = ", ".join(map(str, args))
            raise ValueError(f"{path}: {value!r} is unknown; accepted: {known}")
        return value
    if dataclasses.is_dataclass(hint):
        return read(hint, {} if value is None else value, path)
    if (origin or hint) in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise TypeError(f"{path}: expected a mapping, got {_show(value)}")
        return dict(value)
    return _scalar(value, origin or hint, path)


def _union(value, options, path: str):
    if value is None and type(None) in options:
        return None
    rest = [o for o in options if o is not type(None)]
    if len(rest) == 1:
        return convert(value, rest[0], path)
    for option in rest:
        try:
            return convert(value, option, path)
        except TypeError:
            continue
    names = " or ".join(_name(o) for o in options)
    raise TypeError(f"{path}: expected {names}, got {_show(value)}")


def _items(value, hint, path: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{path}: expected a list, got {_show(value)}")
    return tuple(convert(v, hint, join(path, i)) for i, v in enumerate(value))


def _scalar(value, kind: type, path: str):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_bool = isinstance(value, bool)
    if isinstance(value, kind) and (kind is bool) == (is_bool or kind is bool):
        return value
    raise TypeError(f"{path}: expected {_name(kind)}, got {_show(value)}")


def _name(hint) -> str:
    if dataclasses.is_dataclass(hint) or hint in (dict, Mapping):
        return "a mapping"
    if typing.get_origin(hint) is tuple:
        return "a list"
    known = {int: "a whole number", float: "a number", str: "text"}
    return known.get(hint, {bool: "true or false"}.get(hint, str(hint)))


def _show(value) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def override(data: Any, assignment: str) -> Any:
    """``data`` with one ``dotted.path=value``; list items by index, value as YAML.

    >>> override({"transforms": [{"gptq": {"bits": 4}}]}, "transforms.0.gptq.bits=3")
    {'transforms': [{'gptq': {'bits': 3}}]}

    Raises:
      ValueError: No ``=``, an index outside a list, a path through a plain value.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ValueError(f"{assignment!r} is not an override; expected key=value")
    value = parse_yaml(text, f"the value of {path}")
    return _assign(data, path.strip().split("."), value, assignment)


def _assign(node, parts: list[str], value, assignment: str):
    if not parts:
        return value
    name, *rest = parts
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            size = len(node)
            raise ValueError(f"{assignment!r}: {name!r} is no index of {size} items")
        at = int(name)
        changed = _assign(node[at], rest, value, assignment)
        return [*node[:at], changed, *node[at + 1 :]]
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ValueError(f"{assignment!r}: there is no {name!r} inside {_show(node)}")
    return node | {name: _assign(node.get(name), rest, value, assignment)}
