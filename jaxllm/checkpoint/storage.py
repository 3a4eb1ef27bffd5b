"""Where checkpoints lie: a local path, ``gs://`` or ``s3://``, and whole or not at all.

Orbax and TensorStore write local paths and ``gs://`` by themselves. Orbax refuses
``s3://``: such a checkpoint is staged in a temporary folder and its files travel
through TensorStore's own S3 driver, the manifest last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoint import arrays

MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
# All that a checkpoint has at its top: nothing else is ever deleted.
NAMES = frozenset((MANIFEST, arrays.FOLDER, TOKENIZER))
PROBE = ".writable-"
SCHEMES = ("gs://", "s3://")


def scheme(uri: str | os.PathLike) -> str:
    """``gs``, ``s3`` or ``file``; another scheme is refused.

    >>> scheme("gs://bucket/run"), scheme("runs/a")
    ('gs', 'file')
    """
    found = re.match(r"([A-Za-z0-9+.-]+)://", str(uri))
    if found is None:
        return "file"
    if found[0] not in SCHEMES:
        accepted = "a local path, gs:// or s3://"
        raise ValueError(f"{uri!s} cannot hold a checkpoint; accepted: {accepted}")
    return found[1]


def location(uri: str | os.PathLike):
    """An absolute ``epath.Path`` of a local or ``gs://`` URI."""
    from etils import epath

    if scheme(uri) == "file":
        return epath.Path(Path(uri).expanduser().absolute())
    return epath.Path(str(uri).rstrip("/"))


def check_writable(uri: str | os.PathLike) -> None:
    """Raise ``PermissionError`` when nothing can be written below ``uri``.

    A small file is written and removed again; call it before any long compute.
    """
    name = f"{PROBE}{uuid.uuid4().hex}"
    try:
        if scheme(uri) == "s3":
            _probe_s3(str(uri), name)
        else:
            _probe_folder(location(uri), name)
    except ValueError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"cannot write to {uri!s} ({reason}); choose another folder"
        raise PermissionError(message) from error


def _probe_folder(folder, name: str) -> None:
    """Leaves no folder behind that was not there before."""
    local = scheme(os.fspath(folder)) == "file"
    if local and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    if local:
        while not folder.exists():
            folder = folder.parent
    probe = folder / name
    probe.write_text("")
    probe.unlink()


def _probe_s3(uri: str, name: str) -> None:
    store = _s3(uri)
    store[name] = b""
    del store[name]


@contextlib.contextmanager
def writing(uri: str | os.PathLike, overwrite: bool = False) -> Iterator[Any]:
    """A folder to fill; on a clean exit it becomes the checkpoint at ``uri``.

    The caller writes the manifest last. Locally the folder has another name until it
    is whole and is then renamed; in the cloud an old manifest goes first.

    Raises:
      FileExistsError: A whole checkpoint is there and ``overwrite`` is false, or
        something that no checkpoint has (with ``overwrite`` too).
    """
    foreign = sorted(_names(uri) - NAMES)
    if foreign:
        raise FileExistsError(
            f"{uri!s} holds {foreign[0]!r}, which is of no checkpoint, and is left as "
            "it is; choose another folder"
        )
    if exists(uri) and not overwrite:
        raise FileExistsError(f"{uri!s} exists already; pass overwrite=True or move it")
    kinds = {"file": _writing_local, "gs": _writing_gs, "s3": _writing_s3}
    with kinds[scheme(uri)](uri) as folder:
        yield folder


@contextlib.contextmanager
def reading(uri: str | os.PathLike) -> Iterator[Any]:
    """The folder of a checkpoint (``s3://``: a temporary copy).

    Raises:
      FileNotFoundError: Nothing at ``uri``.
    """
    if scheme(uri) == "s3":
        with tempfile.TemporaryDirectory(prefix="jaxllm-") as folder:
            _download(str(uri), Path(folder))
            yield location(folder)
        return
    folder = location(uri)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint at {uri!s}: it does not exist")
    yield folder


def exists(uri: str | os.PathLike) -> bool:
    """Whether a whole checkpoint is at ``uri``."""
    if scheme(uri) == "s3":
        return _s3(str(uri)).read(MANIFEST).result().state == "value"
    return (location(uri) / MANIFEST).exists()


def _names(uri: str | os.PathLike) -> set[str]:
    """What is at the top of ``uri``, less the probes of ``check_writable``."""
    if scheme(uri) == "s3":
        keys = (key.decode() for key in _s3(str(uri)).list().result())
        found = {key.partition("/")[0] for key in keys if key}
    else:
        folder = location(uri)
        found = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in found if not name.startswith(PROBE)}


def stored_bytes(uri: str | os.PathLike) -> int:
    """Bytes of all files of a checkpoint on disk."""
    with reading(uri) as folder:
        return _size(folder)


def _size(path) -> int:
    if path.is_dir():
        return sum(map(_size, path.iterdir()))
    return path.stat().length


@contextlib.contextmanager
def _writing_local(uri) -> Iterator[Any]:
    folder = location(uri)
    part = folder.parent / f".{folder.name}.part"
    if jax.process_index() == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    barrier(f"start {uri}")
    try:
        yield part
        barrier(f"end {uri}")
        if jax.process_index() == 0:
            _replace(Path(part), Path(folder))
        barrier(f"published {uri}")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _replace(new: Path, target: Path) -> None:
    """Rename; an old checkpoint steps aside first and is back if the rename fails."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _writing_gs(uri) -> Iterator[Any]:
    folder = location(uri)
    if jax.process_index() == 0 and folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # from here on no checkpoint
        folder.rmtree()
    barrier(f"start {uri}")
    yield folder
    barrier(f"end {uri}")


@contextlib.contextmanager
def _writing_s3(uri) -> Iterator[Any]:
    if jax.process_count() > 1:
        raise ValueError("s3:// is written by one process; use gs:// on several hosts")
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as folder:
        yield location(folder)
        _upload(Path(folder), str(uri))


def barrier(name: str) -> None:
    """Wait for the other processes, where there are any."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _s3(uri: str):
    """TensorStore's key-value store below an ``s3://bucket/path``.

    ``AWS_ENDPOINT_URL`` and ``AWS_REGION`` are honoured, credentials are found as in
    every AWS tool.
    """
    import tensorstore

    bucket, _, path = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"{uri} names no bucket; expected s3://bucket/path")
    spec = {"driver": "s3", "bucket": bucket, "path": path.rstrip("/") + "/"}
    names = {"endpoint": "AWS_ENDPOINT_URL", "aws_region": "AWS_REGION"}
    spec |= {k: os.environ[v] for k, v in names.items() if v in os.environ}
    return tensorstore.KvStore.open(spec).result()


def _upload(folder: Path, uri: str) -> None:
    import tensorstore

    store = _s3(uri)
    store.write(MANIFEST, None).result()  # from here on it is no checkpoint
    store.delete_range(tensorstore.KvStore.KeyRange()).result()
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in sorted(files, key=lambda p: p.name == MANIFEST):
        store.write(file.relative_to(folder).as_posix(), file.read_bytes()).result()


def _download(uri: str, folder: Path) -> None:
    store = _s3(uri)
    names = [key.decode() for key in store.list().result()]
    if not names:
        raise FileNotFoundError(f"no checkpoint at {uri}: it does not exist")
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(name).result().value)
