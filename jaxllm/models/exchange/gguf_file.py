"""The GGUF container: metadata, a table of tensors, then their aligned data.

Version 3, little endian, as the specification beside ggml has it: magic, version,
counts; key, type, value; name, dimensions (the fastest first), type, offset.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32, INT32, FLOAT32 = 4, 5, 6
LONGEST = 1 << 28  # no real count or length is above this


class Kind(NamedTuple):
    """A tensor type of ggml: its number, and bytes per block of ``size`` values."""

    name: str
    number: int
    size: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file; ``shape`` has the slowest axis first."""

    name: str
    file: Path
    kind: int
    shape: tuple[int, ...]
    start: int

    def rows(self, kind: Kind) -> np.ndarray:
        """The bytes [rows, bytes of a row], mapped from the file.

        Raises ``ValueError`` for rows that are no whole blocks, or a truncated file.
        """
        if self.shape[-1] % kind.size:
            raise ValueError(f"{self.file}: {self.name!r} is {self.shape} {kind.name}")
        shape = math.prod(self.shape[:-1]), self.shape[-1] // kind.size * kind.nbytes
        if self.start + math.prod(shape) > self.file.stat().st_size:
            raise ValueError(f"{self.file} is truncated: {self.name!r} goes beyond it")
        return np.memmap(self.file, np.uint8, "r", self.start, shape)


class Tensor(NamedTuple):
    """A tensor to be written: ``make()`` gives its bytes when it is its turn."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.size * self.kind.nbytes


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Iterable[Tensor]
) -> None:
    """Write a file, one tensor in memory at a time."""
    tensors = list(tensors)
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _typed(value))
        at = 0
        for t in tensors:
            dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape[::-1])
            file.write(_text(t.name) + dims + struct.pack("<IQ", t.kind.number, at))
            at += t.nbytes + -t.nbytes % ALIGNMENT
        for t in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            data = np.ascontiguousarray(t.make()).reshape(-1).view(np.uint8)
            if data.nbytes != t.nbytes:
                raise AssertionError(f"{t.name}: {data.nbytes} bytes, not {t.nbytes}")
            file.write(data)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    """A value behind its type: int as uint32, float as float32, lists as arrays."""
    if isinstance(value, list):
        item = value[0] if value else ""
        kind = INT32 if isinstance(item, int) else _kind(item)
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return head + b"".join(map(_text, value))
        return head + np.asarray(value, NUMBERS[kind]).tobytes()
    kind = _kind(value)
    head = struct.pack("<I", kind)
    if kind == STRING:
        return head + _text(value)
    return head + np.asarray(value, NUMBERS[kind]).tobytes()


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return BOOL
    return UINT32 if isinstance(value, int) else FLOAT32


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Slot]]:
    """Metadata and tensors of a file; reads no data.

    Raises ``ValueError`` for another format or version, and for damage.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != MAGIC:
            raise ValueError(f"{path} is no GGUF file")
        version = reader.number(UINT32)
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF version {version}; accepted: 2, 3")
        tensors, keys = reader.count(), reader.count()
        metadata = {reader.text(): reader.value() for _ in range(keys)}
        table = [reader.slot() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", ALIGNMENT))
        start = file.tell() + -file.tell() % alignment
    found = {s.name: dataclasses.replace(s, start=start + s.start) for s in table}
    return metadata, found


class _Reader:
    """Values one after another; a file that ends within one is truncated."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            raise ValueError(f"{self.path} is truncated in its header")
        return data

    def number(self, kind: int):
        dtype = NUMBERS.get(kind)
        if dtype is None:
            raise ValueError(f"{self.path}: metadata of unknown type {kind}")
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self) -> int:
        value = self.number(10)
        if value > LONGEST:
            raise ValueError(f"{self.path} is damaged: a count of {value}")
        return value

    def text(self) -> str:
        return self.take(self.count()).decode("utf-8", "replace")

    def value(self, kind: int | None = None):
        kind = self.number(UINT32) if kind is None else kind
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(kind)
        inner, count = self.number(UINT32), self.count()
        if inner in NUMBERS:
            data = self.take(count * NUMBERS[inner].itemsize)
            return np.frombuffer(data, NUMBERS[inner]).tolist()
        return [self.value(inner) for _ in range(count)]

    def slot(self) -> Slot:
        name, axes = self.text(), self.number(UINT32)
        if not 1 <= axes <= 4:
            raise ValueError(f"{self.path}: tensor {name!r} has {axes} axes")
        shape = tuple(self.count() for _ in range(axes))[::-1]
        kind = self.number(UINT32)
        return Slot(name, self.path, kind, shape, self.number(10))
