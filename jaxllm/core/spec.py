"""Expressions: values that print as the call that makes them.

A member of the vocabulary is written as a plain function that returns a closure;
``expression`` wraps it so that what it returns is hashable, compares by name and
arguments, prints as its spec and tells which statistics it needs. ``encode`` and
``decode`` carry specs and configs through YAML, history, manifest and report.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Expression:
    """A named call: ``name(**arguments)``, and the value (a callable) it stands for."""

    name: str
    arguments: tuple[tuple[str, Any], ...]
    call: Any = dataclasses.field(compare=False)
    own_needs: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    defaults: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)
    variadic: str | None = dataclasses.field(default=None, compare=False)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def __repr__(self) -> str:
        """The call: what stands before a variadic argument is given by position."""
        defaults = dict(self.defaults)
        names = [k for k, _ in self.arguments]
        placed = names.index(self.variadic) if self.variadic else 0
        shown = [repr(v) for _, v in self.arguments[:placed]]
        for k, v in self.arguments[placed:]:
            if k == self.variadic:
                shown += map(repr, v)
            elif k not in defaults or defaults[k] != v:
                shown.append(f"{k}={v!r}")
        return f"{self.name}({', '.join(shown)})"

    def __getattr__(self, name: str):
        for key, value in object.__getattribute__(self, "arguments"):
            if key == name:
                return value
        raise AttributeError(f"{self.name} has no argument {name!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the calibration statistics that this expression reads."""
        found = set(self.own_needs)
        for value in (*(v for _, v in self.arguments), self.call):
            for part in value if isinstance(value, tuple) else (value,):
                found |= set(getattr(part, "needs", ()) or ())
        return tuple(sorted(found))


def expression(make: Callable | None = None, *, needs=(), kind: type = Expression):
    """Turn a function that returns a closure into a maker of expressions.

    ``needs`` names the statistics that the closure itself reads; those of its
    arguments are added. Unknown arguments raise ``TypeError``, as for any call.
    """
    if make is None:
        return functools.partial(expression, needs=needs, kind=kind)
    signature = inspect.signature(make)
    defaults = tuple(
        (k, p.default)
        for k, p in signature.parameters.items()
        if p.default is not inspect.Parameter.empty
    )
    variadic = variadic_name(signature)

    @functools.wraps(make)
    def build(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            accepted = ", ".join(signature.parameters)
            message = f"{make.__name__}: {error}; it accepts: {accepted}"
            raise TypeError(message) from None
        bound.apply_defaults()
        arguments = tuple((k, _frozen(v)) for k, v in bound.arguments.items())
        made = make(*bound.args, **bound.kwargs)
        return kind(make.__name__, arguments, made, tuple(needs), defaults, variadic)

    return build


def variadic_name(signature: inspect.Signature) -> str | None:
    """The name of the parameter that takes any number of arguments by position."""
    kinds = {p.kind: name for name, p in signature.parameters.items()}
    return kinds.get(inspect.Parameter.VAR_POSITIONAL)


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def encode(value) -> Any:
    """A spec or config as JSON data (inverse: ``decode``).

    Expressions become ``{name: {argument: ...}}``, frozen dataclasses of this
    package ``{"$type": "module.Class", ...}``, tuples lists.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Expression():
            return {value.name: {k: encode(v) for k, v in value.arguments}}
        case tuple() | list():
            return [encode(v) for v in value]
        case Mapping():
            return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, np.dtype):
        return {"$dtype": value.name}
    if dataclasses.is_dataclass(value):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        kind = type(value)
        name = {"$type": f"{kind.__module__}.{kind.__qualname__}"}
        return name | {k: encode(v) for k, v in fields}
    raise TypeError(f"{value!r} has no spec; dataclasses, numbers and strings have one")


def decode(data, resolve: Callable[[str], Callable] | None = None):
    """Rebuild what ``encode`` wrote; ``resolve`` finds a maker by its name."""
    if isinstance(data, list):
        return tuple(decode(v, resolve) for v in data)
    if not isinstance(data, dict):
        return data
    if "$dtype" in data:
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8 by name

        return np.dtype(data["$dtype"])
    if "$type" in data:
        fields = {k: decode(v, resolve) for k, v in data.items() if k != "$type"}
        return find_class(data["$type"])(**fields)
    if len(data) == 1 and resolve is not None:
        ((name, arguments),) = data.items()
        arguments = {k: decode(v, resolve) for k, v in (arguments or {}).items()}
        return call(resolve(name), arguments)
    return {k: decode(v, resolve) for k, v in data.items()}


def call(make: Callable, arguments: Mapping[str, Any]):
    """``make(**arguments)`` for makers with a variadic parameter too (compose)."""
    args, kwargs, signature = [], dict(arguments), inspect.signature(make)
    if (variadic := variadic_name(signature)) in kwargs:
        before = itertools.takewhile(lambda n: n != variadic, signature.parameters)
        args += [kwargs.pop(name) for name in before if name in kwargs]
        args += kwargs.pop(variadic)
    return make(*args, **kwargs)


def find_class(qualified: str) -> type:
    """The dataclass of this package with a qualified name; no other is loaded."""
    module, _, name = qualified.rpartition(".")
    if module.partition(".")[0] not in ("jaxllm", "pallas_kernels"):
        raise ValueError(f"refused to load {qualified!r}: not a class of this package")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{qualified!r} is not a known config or weight class")
    return found


def marked(body: Callable, **marks) -> Callable:
    """A closure with what others may read of it: ``needs``, ``whole`` ..."""
    vars(body).update(marks)
    return body


def walk_expressions(value) -> Iterator[Expression]:
    """All expressions inside a spec and its body, itself first."""
    if isinstance(value, Expression):
        yield value
        yield from walk_expressions(value.call)
        for _, argument in value.arguments:
            yield from walk_expressions(argument)
    elif isinstance(value, tuple):
        for part in value:
            yield from walk_expressions(part)
