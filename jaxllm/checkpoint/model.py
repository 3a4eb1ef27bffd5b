"""Save and restore a model of any weight types, bit for bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.checkpoint import arrays, manifest, storage
from jaxllm.core.model import History, Model
from jaxllm.core.spec import Expression, decode, encode
from jaxllm.core.structure import abstract, build, describe, leaf_shapes
from jaxllm.distributed import shardings


def save(
    model: Model,
    uri: str | os.PathLike,
    *,
    tokenizer=None,
    calibration=None,
    seeds: Mapping[str, int] | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint to a local path, ``gs://`` or ``s3://``.

    Leaves are stored as they are (packed codes stay packed, a tied weight is stored
    once). The manifest records config, weight types, history, versions and a hash of
    each leaf.

    Args:
      model: Any model; history entries need a spec (``core.spec``).
      uri: A folder that does not exist yet, or holds a checkpoint and nothing else.
      tokenizer: Travels along in ``tokenizer/``.
      calibration: What the history was calibrated on; its ``spec`` is recorded.
      seeds, notes: JSON data for the manifest.
      overwrite: Replace a checkpoint that is there.

    Raises:
      FileExistsError: A checkpoint is at ``uri`` and ``overwrite`` is false, or
        anything else is there.
      PermissionError: Nothing can be written there.
    """
    structure, leaves = describe(model.params)
    record = manifest.header("model") | {
        "config": encode(model.config),
        "history": [encode(spec) for spec in model.history.specs],
        "made_by": [repr(spec) for spec in model.history.specs],
        "calibration": getattr(calibration, "spec", None),
        "seeds": dict(seeds or {}),
        "notes": dict(notes or {}),
        "tokenizer": storage.TOKENIZER if tokenizer is not None else None,
        "structure": structure,
        "checksums": {path: arrays.digest(leaf) for path, leaf in leaves.items()},
    }
    storage.check_writable(uri)
    with storage.writing(uri, overwrite) as folder:
        arrays.write(folder, leaves)
        if tokenizer is not None and jax.process_index() == 0:
            _save_tokenizer(tokenizer, folder / storage.TOKENIZER)
        manifest.write(folder, record)


def restore(
    uri: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    sharding: arrays.Sharding | None = None,
    resolve: Callable[[str], Callable] | None = None,
    verify: bool = True,
) -> Model:
    """The model saved at ``uri``, onto one device or any mesh.

    Args:
      mesh: Devices that hold the leaves, split by the rules of
        ``jaxllm.distributed``; each device reads its part only.
      sharding: ``(path, shape) -> Sharding`` for each leaf in place of the rules, path
        as in ``layers.0.attn.q.weight.planes.0``.
      resolve: Finds the maker of a transform by name, so that the history can be
        applied again; without it the history is a record that prints and compares.
      verify: Compare each leaf with its checksum.

    Raises:
      FileNotFoundError: Nothing there.
      ValueError: Not a checkpoint, half-written, damaged, or of a newer format.
    """
    with storage.reading(uri) as folder:
        record = manifest.load(folder, "model", uri)
        config = decode(record["config"], resolve)
        shapes = leaf_shapes(record["structure"], resolve)
        place = sharding or _by_rules(config, record["structure"], mesh, resolve)
        leaves = arrays.read(
            folder, shapes, lambda path, s: place(path.replace("/", "."), s)
        )
    if verify:
        arrays.check(leaves, record["checksums"], uri)
    params = build(record["structure"], lambda path, _: leaves[path], resolve)
    specs = tuple(decode(s, resolve or recorded) for s in record["history"])
    return Model(params, config, History(specs, str(uri)))


def restore_tokenizer(uri: str | os.PathLike, load: Callable[[str], Any]):
    """``load(folder)`` of the tokenizer that was saved along, or None."""
    with storage.reading(uri) as folder:
        saved = folder / storage.TOKENIZER
        if not saved.exists():
            return None
        with tempfile.TemporaryDirectory(prefix="jaxllm-") as copy:
            for file in saved.iterdir():
                Path(copy, file.name).write_bytes(file.read_bytes())
            return load(copy)


def recorded(name: str) -> Callable[..., Expression]:
    """A maker of expressions that print and compare, and refuse to run."""

    def refuse(*args, **kwargs):
        raise TypeError(f"{name} is a record of a checkpoint; restore it with resolve=")

    def make(**arguments) -> Expression:
        return Expression(name, tuple(arguments.items()), refuse)

    return make


def _by_rules(config, structure, mesh: Mesh | None, resolve) -> arrays.Sharding:
    """One device, or the sharding rules on a mesh, from shapes alone."""
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return lambda path, shape: one
    split = shardings(Model(abstract(structure, resolve), config), mesh).params
    names = build(structure, lambda path, _: path.replace("/", "."), resolve)
    leaves = jax.tree.leaves(names), jax.tree.leaves(split)
    by_path = dict(zip(*leaves, strict=True))
    return lambda path, shape: by_path[path]


def _save_tokenizer(tokenizer, target) -> None:
    """A tokenizer writes local files; they are copied to wherever ``target`` is."""
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as local:
        tokenizer.save(local)
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(local).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
