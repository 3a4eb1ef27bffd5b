"""Which source a result depends on: a digest that changes when its code does.

A method depends on the modules that it imports, and those on theirs, within
``jaxllm.core`` and ``jaxllm.methods``. A package's ``__init__`` stands for the modules
of the names that are taken from it. Comments, docstrings and
cards do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from jaxllm import methods

COUNTED = ("jaxllm.core", "jaxllm.methods.")


def digest(spec: str) -> str:
    """Twelve hex digits of all source behind a spec."""
    names = (n.id for n in ast.walk(ast.parse(spec)) if isinstance(n, ast.Name))
    modules = {methods.find(name).__module__ for name in names}
    total = hashlib.sha256()
    for module in sorted(closure(frozenset(modules))):
        total.update(f"{module}\n{_code(module)}\n".encode())
    return total.hexdigest()[:12]


@functools.cache
def closure(modules: frozenset[str]) -> frozenset[str]:
    """The modules and all that they import."""
    found: set[str] = set()
    waiting = [*modules]
    while waiting:
        module = waiting.pop()
        if module not in found and module.startswith(COUNTED):
            found.add(module)
            waiting += imports(module)
    return frozenset(found)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules whose names a module uses."""
    body, found = _tree(module), set()
    for node in ast.walk(body):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if not _path(whole):
                found.add(_origin(node.module, alias.name))
            elif _path(whole).name == "__init__.py":
                mine = alias.asname or alias.name
                found |= {_origin(whole, name) for name in _attributes(body, mine)}
            else:
                found.add(whole)
    return frozenset(found)


def _attributes(body: ast.Module, owner: str) -> Iterator[str]:
    """The names that are read as ``owner.name``."""
    for node in ast.walk(body):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if name == owner:
                yield attr


@functools.cache
def _origin(module: str, name: str) -> str:
    """The module that a name of a package comes from."""
    path = _path(module)
    if path and path.name == "__init__.py" and module.startswith("jaxllm."):
        for node in ast.walk(_tree(module)):
            match node:
                case ast.ImportFrom(module=str(origin), names=names) if any(
                    name == (a.asname or a.name) for a in names
                ):
                    return _origin(origin, name)
    return module


@functools.cache
def _path(module: str) -> Path | None:
    """The source file of one of our modules."""
    if not module.startswith(("jaxllm.", "pallas_kernels.")):
        return None
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name inside a module, not a module
        return None
    return Path(found.origin) if found and found.origin else None


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    return ast.parse(path.read_text(encoding="utf-8") if path else "")


@functools.cache
def _code(module: str) -> str:
    """The source without comments, docstrings and the card, which claims results."""
    body = ast.parse(ast.unparse(_tree(module)))
    body.body = [node for node in body.body if not _is_card(node)]
    for node in ast.walk(body):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(body)


def _is_card(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "card"
