"""Tuned tile sizes by device kind, op and shape: committed tables, read once.

``tuning/<device>.json`` holds {op: {"8x4096x6144x4x128": {field: value}}}, written
by ``experiments/kernels/tune.py`` on that device. Without a table, or an entry,
kernels use their default rule.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib import resources

import jax

Fields = Mapping[str, int | bool]


def slug(device_kind: str) -> str:
    """A device kind as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def key(shape: tuple[int, ...]) -> str:
    """A shape as it stands in the table."""
    return "x".join(str(size) for size in shape)


def look_up(op: str, shape: tuple[int, ...]) -> Fields | None:
    """The tuned fields for this shape on the default device, or None."""
    return table(slug(jax.devices()[0].device_kind)).get(op, {}).get(key(shape))


@functools.cache
def table(device: str) -> Mapping[str, Mapping[str, Fields]]:
    """The table of a device; {} where none is committed. ValueError if malformed."""
    file = resources.files("pallas_kernels") / "tuning" / f"{device}.json"
    if not file.is_file():
        return {}
    return validate(json.loads(file.read_text(encoding="utf-8")), file.name)


def validate(found, name: str) -> Mapping[str, Mapping[str, Fields]]:
    """``found`` if it is a table, else ValueError naming the entry."""
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {type(found).__name__}; accepted: an object of ops")
    for op, entries in found.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{name}: {op} holds no object of shapes")
        for shape, fields in entries.items():
            sizes = re.fullmatch(r"\d+(x\d+)*", shape)
            numbers = isinstance(fields, dict) and all(
                isinstance(value, int) and value >= 0 for value in fields.values()
            )
            if not sizes or not numbers:
                raise ValueError(f"{name}: {op}/{shape}: {fields!r} is no tuning")
    return found
