"""The manifest: what a checkpoint says about itself, and how it is refused."""

from __future__ import annotations

import importlib.metadata
import json
import os
from typing import Any

import jax

from jaxllm.checkpoint import arrays, storage

FORMAT = 1


def package_version() -> str:
    """The installed version, or ``unknown`` in a source tree that is not installed."""
    try:
        return importlib.metadata.version("jaxllm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def header(kind: str) -> dict[str, Any]:
    """What every manifest begins with."""
    versions = {"jaxllm": package_version(), "jax": jax.__version__}
    return {"format": FORMAT, "kind": kind, "versions": versions}


def write(folder, manifest: dict[str, Any]) -> None:
    """Last of all files; only process 0 writes."""
    storage.barrier(f"manifest {folder}")
    if jax.process_index() == 0:
        rows = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in manifest.items())
        (folder / storage.MANIFEST).write_text("{\n" + ",\n".join(rows) + "\n}\n")


def load(folder, kind: str, uri) -> dict[str, Any]:
    """The manifest in a folder, checked.

    Raises:
      ValueError: Not a checkpoint, a half-written one, one of another kind, damaged,
        or of a newer format than this version reads.
    """
    file = folder / storage.MANIFEST
    if not file.exists():
        if (folder / arrays.FOLDER).exists():
            raise ValueError(f"{uri!s} is half-written: it has arrays but no manifest")
        raise ValueError(f"{uri!s} is not a checkpoint: no {storage.MANIFEST} in it")
    try:
        manifest = json.loads(file.read_text())
        found, version = manifest["kind"], manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the manifest of {uri!s} is damaged: {error!r}") from None
    if version > FORMAT:
        raise ValueError(
            f"{uri!s} has checkpoint format {version}, this version reads up to "
            f"{FORMAT}: update jaxllm"
        )
    if found != kind:
        raise ValueError(f"{uri!s} is of kind {found!r}, expected {kind!r}")
    return manifest


def read_manifest(uri: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the model saved at ``uri``, as JSON data."""
    with storage.reading(uri) as folder:
        return load(folder, "model", uri)
