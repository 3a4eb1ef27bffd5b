"""Checkpoints that describe themselves: Orbax arrays and one manifest.

``uri/arrays`` holds the leaves, ``uri/manifest.json`` everything else: the config, the
weight types with their static fields, the transforms that made the model, seeds, the
calibration set and a hash of every leaf. The manifest is written last, so a folder
without one is never taken for a checkpoint.
"""

from jaxllm.checkpoint.manifest import FORMAT, read_manifest
from jaxllm.checkpoint.model import restore, restore_tokenizer, save
from jaxllm.checkpoint.resume import FolderStore
from jaxllm.checkpoint.storage import check_writable, stored_bytes

__all__ = [
    "FORMAT",
    "FolderStore",
    "check_writable",
    "read_manifest",
    "restore",
    "restore_tokenizer",
    "save",
    "stored_bytes",
]
