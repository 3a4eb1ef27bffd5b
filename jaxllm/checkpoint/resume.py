"""Resume points: any tree under a name, whole or absent."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import jax

from jaxllm.checkpoint import arrays, manifest, storage
from jaxllm.core.structure import build, describe, leaf_shapes


class FolderStore:
    """Trees of arrays and weights below one folder, by name.

    A point is replaced as a whole: a process that dies while it saves leaves the
    earlier point (or none) behind.
    """

    def __init__(self, path: str | os.PathLike):
        if storage.scheme(path) != "file":
            raise ValueError(f"resume points are local; got {path!s}")
        self.path = Path(path)

    def save(self, name: str, tree) -> None:
        """Write ``tree`` (dicts, lists, tuples, dataclasses, arrays, numbers)."""
        structure, leaves = describe(tree)
        sums = {path: arrays.digest(leaf) for path, leaf in leaves.items()}
        record = manifest.header("resume point")
        record |= {"structure": structure, "checksums": sums}
        with storage.writing(self._folder(name), overwrite=True) as folder:
            arrays.write(folder, leaves)
            manifest.write(folder, record)

    def load(self, name: str):
        """The tree saved under ``name``, or None; arrays are on the first device.

        Raises:
          ValueError: The point is damaged.
        """
        target = self._folder(name)
        target = target if target.exists() else target.with_name(f".{target.name}.old")
        if not storage.exists(target):
            return None
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with storage.reading(target) as folder:
            record = manifest.load(folder, "resume point", target)
            shapes = leaf_shapes(record["structure"])
            leaves = arrays.read(folder, shapes, lambda path, shape: device)
        arrays.check(leaves, record["checksums"], target)
        return build(record["structure"], lambda path, _: leaves[path])

    def clear(self) -> None:
        """Forget all points."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _folder(self, name: str) -> Path:
        part = r"[A-Za-z0-9_][A-Za-z0-9_.=,()-]*"
        if not re.fullmatch(f"{part}(/{part})*", name):
            raise ValueError(f"{name!r} cannot name a resume point: try [A-Za-z0-9_.-]")
        return self.path / name
