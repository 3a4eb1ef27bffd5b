"""Published methods: ``<family>/<name>.py`` holds one, and its name is the file's.

``from jaxllm.methods import gptq, wanda`` finds them by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from jaxllm.core import card as _card
from jaxllm.core import vocabulary as _vocabulary


def entries() -> dict[str, _card.Entry]:
    """All methods by name."""
    return _card.discover(__name__)


def find(name: str) -> Callable:
    """The maker of a method, of a composition or of a member of the vocabulary."""
    found = entries()
    if name in found:
        return found[name].make
    core = _vocabulary.members()
    if name in core:
        return core[name]
    raise ValueError(f"unknown method {_card.nearest(name, {**found, **core})}")


def parse(text: str):
    """The transform that a spec such as ``gptq(bits=3)`` names."""
    return _card.parse(text, find)


def _ordered() -> list[_card.Entry]:
    return sorted(entries().values(), key=lambda e: (e.family, e.name))


def table() -> str:
    """All methods as a Markdown table: what docs/methods.md shows (a test compares)."""
    lines = ["| family | method | paper | beats, at equal bytes |", "|---|---|---|---|"]
    for e in _ordered():
        claims = "; ".join(f"`{c.over}` ({c.model})" for c in e.card.claims)
        lines.append(
            f"| {e.family} | `{e.name}` {e.card.title} | {e.card.paper} | {claims} |"
        )
    return "\n".join(lines)


def summary() -> str:
    """The names of all methods by family: what README shows (a test compares)."""
    lines = ["| family | methods |", "|---|---|"]
    for family, group in itertools.groupby(_ordered(), lambda e: e.family):
        names = ", ".join(f"`{e.name}`" for e in group)
        lines.append(f"| {family} | {names} |")
    return "\n".join(lines)


def __getattr__(name: str) -> Callable:
    if not name.startswith("_") and name in (found := entries()):
        return found[name].make
    raise AttributeError(f"no method {name!r} in {__name__}")
