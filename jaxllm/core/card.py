"""Method cards and discovery: the folder is the registry."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Claim:
    """``spec`` is better than ``over`` in ``metric`` on ``model``, by ``margin``.

    Specs are written as calls. The comparison holds at equal measured size: the
    baseline has at least as many bytes. ``metric`` is ``perplexity`` (of the house
    protocol), ``margin`` the least relative improvement. ``model`` is one of
    ``stories``, ``twin`` (the same with outlier channels) and ``builtin``.
    """

    spec: str
    over: str
    metric: str = "perplexity"
    model: str = "stories"
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Card:
    """What a method is: its title, its paper, what the paper claims.

    ``composes`` says in one sentence what may come before and after it.
    """

    title: str
    paper: str
    claims: tuple[Claim, ...] = ()
    composes: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A discovered method: family and name come from its place."""

    name: str
    family: str
    card: Card
    make: Callable
    module: ModuleType


@functools.cache
def discover(package: str) -> dict[str, Entry]:
    """All methods below a package: ``<family>/<name>.py`` with a ``card``."""
    root = importlib.import_module(package)
    found: dict[str, Entry] = {}
    for family in pkgutil.iter_modules(root.__path__, f"{package}."):
        if not family.ispkg:
            continue
        folder = importlib.import_module(family.name)
        for info in pkgutil.iter_modules(folder.__path__, f"{family.name}."):
            module = importlib.import_module(info.name)
            name = info.name.rpartition(".")[2]
            if name in found:
                raise ImportError(f"two methods are called {name!r}")
            place = family.name.rpartition(".")[2]
            card, make = module.card, getattr(module, name)
            found[name] = Entry(name, place, card, make, module)
    return found


def nearest(name: str, known) -> str:
    """``name`` with the closest known names, for error messages."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)
    return f"{name!r}; nearest: {', '.join(near)}"


def parse(text: str, resolve: Callable[[str], Callable]):
    """The value of a spec written as a call: ``gptq(bits=3, correct=low_rank(8))``.

    Only calls of known names, literals and tuples are read; nothing is executed.
    """

    def value(node):
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(
                k.arg for k in keywords
            ):
                given = {k.arg: value(k.value) for k in keywords if k.arg}
                return resolve(name)(*map(value, args), **given)
            case ast.Constant(value=constant):
                return constant
            case ast.UnaryOp(
                op=ast.USub(), operand=ast.Constant(value=int() | float() as number)
            ):
                return -number
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(map(value, items))
        raise ValueError(f"{text!r} is not a spec: calls, literals and tuples are")

    try:
        return value(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{text!r} is not a spec such as gptq(bits=3)") from None
