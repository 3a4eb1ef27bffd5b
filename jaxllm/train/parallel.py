"""Data parallelism: rows of a batch over the devices, parameters on each of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.core.batch import Batch


def data_mesh(count: int) -> Mesh:
    """A mesh of the first ``count`` devices along one axis, "data".

    Raises:
      ValueError: There are fewer devices.
    """
    devices = jax.devices()
    if not 1 <= count <= len(devices):
        raise ValueError(f"{count} devices are asked for, there are {len(devices)}")
    return Mesh(np.array(devices[:count]), ("data",))


def shard_rows(mesh: Mesh, axis: str = "data") -> Callable[[Batch], Batch]:
    """Places the rows of a batch over one axis of a mesh.

    With parameters replicated over that axis, ``jit`` inserts the reductions.
    """
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    return lambda batch: jax.device_put(batch, sharding)


def replicate(tree, mesh: Mesh):
    """The same tree on a mesh; a leaf that is laid out on a mesh stays as it is."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        laid_out = isinstance(leaf.sharding, NamedSharding)
        return leaf if laid_out else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)
