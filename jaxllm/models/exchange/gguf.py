"""GGUF files: a model's weights in ggml's block types, with what llama.cpp must know.

Each tensor has its own type, so layers may differ; what is dense stays dense, or is
rounded to Q4_K when that is asked for. The llama architecture has the rows of q and k
in rotary pairs, which is a permutation of rows of bytes.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.core.model import Model, get, put
from jaxllm.core.weights import Weight
from jaxllm.models.exchange.affine import describe, scheme_of
from jaxllm.models.exchange.gguf_blocks import BLOCKS, Q4K, SUPER, Block
from jaxllm.models.exchange.gguf_file import Kind, Slot, Tensor, open_gguf, write_gguf
from jaxllm.models.exchange.gguf_names import (
    ARCHITECTURES,
    MODULES,
    read_metadata,
    write_metadata,
)
from jaxllm.models.hub.plan import Entry, make_plan
from jaxllm.models.hub.pretrained import (
    check_shapes,
    halves,
    paired_channels,
    with_pairs,
)
from jaxllm.models.transformer import Transformer

FLOATS = {
    Kind("F32", 0, 1, 4): np.dtype("<f4"),
    Kind("F16", 1, 1, 2): np.dtype("<f2"),
    Kind("BF16", 30, 1, 2): np.dtype(ml_dtypes.bfloat16),
}
F32 = next(iter(FLOATS))
# general.file_type: the type of most tensors, as llama.cpp numbers them.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "Q6_K": 18}
FILE_TYPES |= {"BF16": 32}
ROUNDINGS = ("q4_k",)


def save_gguf(
    model: Model,
    path: str | Path,
    vocabulary: Mapping[str, Any] | None = None,
    round_to: str | None = None,
) -> Path:
    """Write a GGUF file; it appears under ``path`` when it is complete.

    Args:
      model: Llama, Mistral without a window, Qwen 2 or 3. Compressed weights must be
        what a block type holds exactly: ``rtn(bits=4, group_size=32, symmetric=True)``
        is Q4_0, the same with 8 bits Q8_0.
      path: Ends in ``.gguf`` and does not exist.
      vocabulary: The ``tokenizer.ggml.*`` metadata.
      round_to: ``q4_k`` rounds dense linear maps whose inputs are whole super-blocks
        of 256 (head and embedding stay). None rounds nothing.

    Raises:
      FileExistsError: The file exists.
      TypeError, ValueError: A weight that no block type holds, or an architecture that
        the format cannot express; names it, what made it and what is accepted.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"path {str(path)!r}; accepted: a name that ends in .gguf")
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists; name a new file")
    if round_to is not None and round_to not in ROUNDINGS:
        some = ", ".join(ROUNDINGS)
        raise ValueError(f"round_to {round_to!r}; accepted: None, {some}")
    metadata = write_metadata(with_pairs(model.config, False))
    plan = make_plan(model.config, MODULES)
    check_shapes(model, plan)
    rounded = frozenset(model.config.linears()) if round_to else frozenset()
    tensors = [_tensor(model, entry, rounded) for entry in plan.values()]
    metadata |= _general(tensors) | dict(vocabulary or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write_gguf(part / path.name, metadata, tensors)
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _general(tensors: list[Tensor]) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for t in tensors:
        sizes[t.kind.name] = sizes.get(t.kind.name, 0) + t.nbytes
    most = max(sizes, key=lambda name: sizes[name])
    return {
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[most],
    }


def _tensor(model: Model, entry: Entry, rounded: frozenset[str]) -> Tensor:
    """One tensor and how its rows are made; refuses a weight that no type holds."""
    (path,) = entry.parts
    w, order = get(model.params, path), _row_order(model.config, entry)
    module = path.rpartition(".")[0]
    if isinstance(w, Weight):
        block = _block_of(model, path, w)
        make = functools.partial(_rows, block.write, w, order)
        return Tensor(entry.theirs, block.kind, entry.shape, make)
    if module in rounded and w.shape[0] % SUPER == 0:
        block = Q4K()
        write = lambda w: block.write(block.round(np.asarray(w), str(w.dtype)))  # noqa: E731
        make = functools.partial(_rows, write, w, order)
        return Tensor(entry.theirs, block.kind, entry.shape, make)
    kind = F32 if w.ndim == 1 else _float_kind(path, w)
    write = lambda w: np.asarray(w).astype(FLOATS[kind]).T  # noqa: E731
    return Tensor(
        entry.theirs, kind, entry.shape, functools.partial(_rows, write, w, order)
    )


def _rows(write, w, order: np.ndarray | None) -> np.ndarray:
    rows = write(w)
    return rows if order is None else rows[order]


def _float_kind(path: str, w) -> Kind:
    for kind, dtype in FLOATS.items():
        if np.dtype(w.dtype) == dtype:
            return kind
    raise TypeError(f"{path} is {w.dtype}; gguf accepts float32, float16 and bfloat16")


def _block_of(model: Model, path: str, w) -> Block:
    for block in BLOCKS:
        if block.fits(w):
            return block
    try:
        what = str(scheme_of(w))
    except TypeError:
        what = describe(w)
    made = " -> ".join(map(repr, model.history.specs)) or "unknown"
    some = "; ".join(block.holds for block in BLOCKS)
    raise TypeError(
        f"{path} is {what} (made by: {made}); gguf accepts dense weights and {some}, "
        "all with float16 scales. Nothing was written"
    )


def _row_order(config: Transformer, entry: Entry) -> np.ndarray | None:
    """The order in which the file has the rows of q and k; None: as they are."""
    module, _, _ = entry.parts[0].rpartition(".")
    layer, _, name = module.rpartition(".attn.")
    if name not in ("q", "k", "q_norm", "k_norm"):
        return None
    attention = config.layers[int(layer.removeprefix("layers."))].attention
    paired = ARCHITECTURES[config.family].paired
    if attention.rope is None or attention.rope.interleaved == paired:
        return None
    count = entry.shape[0]
    order = halves(count, attention.head_dim)
    return np.argsort(order) if paired else order


def read_gguf_config(path: str | Path, dtype: str = "float32") -> Transformer:
    """The architecture of a GGUF file, without its weights."""
    path = _existing(path)
    metadata, slots = open_gguf(path)
    try:
        return read_metadata(metadata, frozenset(slots), dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_gguf(path: str | Path, dtype: str = "float32") -> Model:
    """The model of a GGUF file; quantized tensors stay quantized.

    Q4_0 and Q8_0 become ``Quantized``, Q6_K the same with doubly quantized scales, and
    Q4_K its codes less a constant per block. Rotary pairs come back as halves. The
    values are those that ggml's own dequantization gives, in ``dtype``.

    Raises:
      FileNotFoundError: No such file.
      ValueError: Another version, damage, an unsupported architecture or tensor type,
        missing, unexpected or misshapen tensors.
    """
    path = _existing(path)
    config = read_gguf_config(path, dtype)
    _, slots = open_gguf(path)
    plan = make_plan(config, MODULES)
    for name in sorted(slots.keys() ^ plan.keys()):
        what = "unexpected" if name in slots else "missing"
        raise ValueError(f"{path}: {what} tensor {name!r} for a {config.family}")
    params: dict[str, Any] = {}
    for name, entry in plan.items():
        slot = slots[name]
        if slot.shape != entry.shape:
            shapes = f"{list(slot.shape)}, expected {list(entry.shape)}"
            raise ValueError(f"{path}: tensor {name!r} is {shapes}")
        params = put(params, entry.parts[0], _read(slot, entry, config, dtype))
    return Model(params, config)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no GGUF file at {str(path)!r}")
    return Path(path)


def _read(slot: Slot, entry: Entry, config: Transformer, dtype: str):
    """One parameter: a dense array [in, out] (or [n]), or a weight type."""
    order = None
    if ARCHITECTURES[config.family].paired:
        paired = with_pairs(config, True)
        dim = paired_channels(paired).get(entry.parts[0].rpartition(".")[0])
        order = None if dim is None else halves(entry.shape[0], dim)
    for kind, stored in FLOATS.items():
        if kind.number == slot.kind:
            values = slot.rows(kind).reshape(-1).view(stored).reshape(slot.shape)
            values = values if order is None else values[order]
            if not np.isfinite(values.astype(np.float32)).all():
                raise ValueError(f"{slot.file}: {slot.name!r} has non-finite values")
            return jnp.asarray(np.array(values.T, jnp.dtype(dtype), order="C"))
    for block in BLOCKS:
        if block.kind.number == slot.kind:
            rows = slot.rows(block.kind)
            rows = np.array(rows) if order is None else rows[order]
            return block.read(rows, slot.shape[-1], dtype)
    known = [kind.name for kind in FLOATS] + [block.kind.name for block in BLOCKS]
    raise ValueError(
        f"{slot.file}: tensor {slot.name!r} has ggml type {slot.kind}; accepted: "
        f"{', '.join(known)}"
    )
