"""Safetensors files, one tensor at a time.

The format: uint64 header length, JSON header {name: {dtype, shape, data_offsets}},
then the raw little-endian tensors. A reader maps the file and copies single tensors,
so that host memory holds one of them beside the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Packed codes and small numbers; no parameter of a dense model.
CODED = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
DTYPES = FLOATS | CODED
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: file, byte range, type code and shape."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """The values of a float tensor, mapped from the file.

        Raises:
          ValueError: The type is no float, or a value is not finite.
        """
        values = self._mapped(FLOATS, " (codes of a quantized checkpoint?)")
        if not np.isfinite(values).all():
            message = f"{self.file}: tensor {self.name!r} has non-finite values"
            raise ValueError(message)
        return values

    def read_codes(self) -> np.ndarray:
        """The values of an integer tensor, mapped from the file."""
        return self._mapped(CODED)

    def _mapped(self, kinds: dict[str, np.dtype], hint: str = "") -> np.ndarray:
        if self.code not in kinds:
            raise ValueError(
                f"{self.file}: tensor {self.name!r} has type {self.code}; accepted: "
                f"{', '.join(kinds)}{hint}"
            )
        if not self.shape or 0 in self.shape:
            raise ValueError(f"{self.file}: tensor {self.name!r} is {self.shape}")
        return np.memmap(self.file, kinds[self.code], "r", self.start, self.shape)


def open_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, sharded or not, by name; reads headers only.

    Raises:
      FileNotFoundError: No safetensors in the folder, or a shard is missing.
      ValueError: A damaged file, or an index that disagrees with its shards.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise FileNotFoundError(_without_weights(folder))
        return open_file(folder / SINGLE)
    where = _read_index(index)
    files = {name: folder / name for name in sorted(set(where.values()))}
    for name, path in files.items():
        if not path.exists():
            raise FileNotFoundError(f"shard {name!r} is missing beside {index}")
    found: dict[str, Tensor] = {}
    for path in files.values():
        for name, tensor in open_file(path).items():
            if where.get(name) != path.name:
                raise ValueError(f"{path} has tensor {name!r}, but {INDEX} does not")
            found[name] = tensor
    for name, file in where.items():
        if name not in found:
            raise ValueError(f"tensor {name!r} is missing in {files[file]}")
    return found


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is truncated or not safetensors: {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {n: _tensor(n, e, path, 8 + length) for n, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged header: {error}") from None
    for tensor in found.values():
        if tensor.stop > size:
            raise ValueError(
                f"{path} is truncated: tensor {tensor.name!r} ends at byte "
                f"{tensor.stop}, the file at {size}"
            )
    return found


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, int, Callable]], shard_bytes: float
) -> None:
    """Write ``(name, bytes, make)`` in shards of at most ``shard_bytes``.

    ``make()`` gives the array of one tensor; only one shard's tensors are alive.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE, {name: make() for name, _, make in shards[0]})
        return
    where, total = {}, 0
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, {key: make() for key, _, make in shard})
        where |= {key: name for key, _, _ in shard}
        total += sum(count for _, count, _ in shard)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one file; the header is padded so that the data is aligned to 8 bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        code = CODES[values.dtype]
        stop = at + values.nbytes
        shape = list(values.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _tensor(name: str, entry: dict, path: Path, base: int) -> Tensor:
    start, stop = (int(x) for x in entry["data_offsets"])
    shape, code = tuple(map(int, entry["shape"])), str(entry["dtype"])
    known = code in DTYPES
    wanted = math.prod(shape) * DTYPES[code].itemsize if known else stop - start
    if not 0 <= start <= stop or stop - start != wanted:
        raise ValueError(f"tensor {name!r} spans {stop - start} bytes, not {wanted}")
    return Tensor(name, path, code, shape, base + start, base + stop)


def _read_index(index: Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None
    for name, file in where.items():
        if Path(file).name != file:
            raise ValueError(f"{index}: tensor {name!r} points outside, at {file!r}")
    return where


def _without_weights(folder: Path) -> str:
    other = sorted(p.name for p in folder.glob("*.bin"))
    hint = f"; {other[0]!r} is a pickle, which is refused" if other else ""
    return f"no {SINGLE} or {INDEX} in {str(folder)!r}{hint}"


def _shards(tensors, limit: float) -> Iterator[list]:
    """Consecutive groups of at most ``limit`` bytes (one tensor may exceed it)."""
    group, size = [], 0
    for entry in tensors:
        if group and size + entry[1] > limit:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry[1]
    if group:
        yield group
