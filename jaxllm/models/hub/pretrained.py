"""Model folders of Hugging Face: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.core.model import Model, get, named_leaves, put
from jaxllm.core.weights import Weight, materialize
from jaxllm.models.hub.configs import read_config_data, write_config_data
from jaxllm.models.hub.plan import Entry, make_plan, match, tied_head
from jaxllm.models.hub.safetensors import FLOATS, Tensor, open_folder, write_folder
from jaxllm.models.transformer import Transformer

CONFIG = "config.json"
QUANTIZATION = "quantization_config"


def read_folder_config(folder: str | Path, dtype: str = "float32") -> Transformer:
    """The architecture of a model folder, from its ``config.json``."""
    raw = read_raw_config(folder)
    raw.pop(QUANTIZATION, None)  # says how weights are stored, not what they are
    try:
        return read_config_data(raw, dtype)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG}: {error}") from None


def read_raw_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder as it is."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {str(folder)!r}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}; accepted: an object")
    return raw


def load_folder(folder: str | Path, dtype: str = "float32") -> Model:
    """The model of a Hugging Face folder (``config.json`` and safetensors).

    Packed weights (a ``quantization_config``) stay packed: see ``models.exchange``.
    Names, shapes and types are checked from the headers before a tensor is read;
    then host memory holds the model and one tensor.

    Raises:
      FileNotFoundError: No configuration, no safetensors, or a missing shard.
      ValueError: Unsupported configuration; missing, unexpected, misshapen or
        non-finite tensors; truncated or damaged files.
    """
    folder = Path(folder)
    if settings := read_raw_config(folder).get(QUANTIZATION):
        from jaxllm.models.exchange import load_quantized

        return load_quantized(folder, settings, dtype)
    config = read_folder_config(folder, dtype)
    params = read_dense(folder, open_folder(folder), config, make_plan(config), dtype)
    return Model(params, config)


def read_dense(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Transformer,
    plan: dict[str, Entry],
    dtype: str,
) -> dict[str, Any]:
    """The parameters that ``plan`` finds in ``tensors``, which must be all of both."""
    try:
        found = match(tensors, plan, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    jobs = [(tensors[n], plan[k]) for n, k in found.items() if k is not None]
    for tensor, entry in jobs:
        if tensor.shape != entry.shape:
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name!r} is {list(tensor.shape)}, "
                f"expected {list(entry.shape)}"
            )
    _check_tied_head(config, tensors, found)
    return _read_params(jobs, config, jnp.dtype(dtype))


def _read_params(jobs: list[tuple[Tensor, Entry]], config: Transformer, dtype) -> dict:
    params: dict[str, Any] = {}
    stacks: dict[str, np.ndarray] = {}
    left: dict[str, int] = {}
    for tensor, entry in tqdm(jobs, "load", disable=len(jobs) < 500):
        values = entry.split(tensor.read())
        for path, shape, value in zip(entry.parts, entry.shapes, values, strict=True):
            if entry.expert is None:
                params = put(params, path, _array(value, dtype))
                continue
            count = _experts(config, path)
            stack = stacks.setdefault(path, np.empty((count, *shape), dtype))
            stack[entry.expert] = value
            left[path] = left.get(path, count) - 1
            if not left[path]:
                params = put(params, path, _array(stacks.pop(path), dtype))
    return params


def _array(values: np.ndarray, dtype) -> jax.Array:
    """A device array that does not share memory with the mapped file."""
    return jnp.asarray(np.array(values, dtype, order="C", copy=True))


def _experts(config: Transformer, path: str) -> int:
    return config.layers[int(path.split(".")[1])].ffn.experts


def _check_tied_head(config: Transformer, tensors, found) -> None:
    """A tied model's file may repeat the embedding as its head, but not another one."""
    name = tied_head(config)
    if name not in tensors:
        return
    embed = next(m for m in found if found[m] and _is_embedding(found[m], config))
    if not np.array_equal(tensors[name].read(), tensors[embed].read()):
        raise ValueError(
            f"{tensors[name].file}: tensor {name!r} differs from {embed!r}, but "
            "tie_word_embeddings is true"
        )


def _is_embedding(theirs: str, config: Transformer) -> bool:
    return make_plan(config)[theirs].parts == ("embed.weight",)


def save_pretrained(
    model: Model, folder: str | Path, tokenizer=None, shard_bytes: float = 5e9
) -> Path:
    """Write a dense model as a Hugging Face folder that ``transformers`` loads.

    Args:
      model: A model of dense weights whose ``config.family`` can express it; rotary
        pairs of neighbours are permuted to the halves that Hugging Face uses.
      folder: Must not exist, or be empty. It appears when it is complete.
      tokenizer: Saved beside the model; its special ids go into ``config.json``.
      shard_bytes: Largest file; each is in host memory once.

    Raises:
      FileExistsError: The folder exists and is not empty.
      TypeError: A weight is compressed; names it and its type.
      ValueError: The family cannot express the model.
    """
    check_vacant(folder)
    _check_dense(model)
    model = rotary_halves(model)
    data = write_config_data(model.config)
    plan = make_plan(model.config)
    check_shapes(model, plan)
    kind = get(model.params, "embed.weight").dtype
    data |= {"torch_dtype": str(kind)}
    jobs = [dense_job(model, e) for e in plan.values()]
    return publish(folder, data, jobs, tokenizer, shard_bytes)


def check_vacant(folder: str | Path) -> None:
    """Refuse a folder that holds something."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} exists; name a new folder")


def publish(
    folder: str | Path, data: dict[str, Any], jobs, tokenizer, shard_bytes: float
) -> Path:
    """Write configuration, tensors and tokenizer; the folder appears when complete."""
    folder = Path(folder)
    data = data | _special_ids(tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_folder(part, jobs, shard_bytes)
        (part / CONFIG).write_text(json.dumps(data, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(part)
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def dense_job(model: Model, entry: Entry):
    """(name, bytes, make) of one tensor, made when its shard is written."""

    def make() -> np.ndarray:
        parts = [get(model.params, path) for path in entry.parts]
        if entry.expert is not None:
            parts = [x[entry.expert] for x in parts]
        return entry.join([np.asarray(x) for x in parts])

    dtype = get(model.params, entry.parts[0]).dtype
    return entry.theirs, int(np.prod(entry.shape)) * dtype.itemsize, make


def _special_ids(tokenizer) -> dict[str, int | None]:
    names = ("bos", "eos", "pad")
    return {f"{n}_token_id": getattr(tokenizer, f"{n}_id", None) for n in names}


def _check_dense(model: Model) -> None:
    is_type = lambda x: isinstance(x, Weight)  # noqa: E731
    for path, leaf in named_leaves(model.params, is_type).items():
        if is_type(leaf):
            raise TypeError(
                f"{path} is {type(leaf).__name__}: only dense models without a format; "
                "name one (gptq, awq, gguf ...), or save it as a checkpoint"
            )
        if np.dtype(leaf.dtype) not in FLOATS.values():
            raise TypeError(f"{path} is {leaf.dtype}; accepted: floats of 2 to 8 bytes")


def check_shapes(model: Model, plan: dict[str, Entry]) -> None:
    """Refuse parameters that the plan lacks or that have another (logical) shape."""
    expected = {
        part: shape if entry.expert is None else (_experts(model.config, part), *shape)
        for entry in plan.values()
        for part, shape in zip(entry.parts, entry.shapes, strict=True)
    }
    is_type = lambda x: isinstance(x, Weight)  # noqa: E731
    leaves = named_leaves(model.params, is_type)
    present = {path: _whole_shape(leaf) for path, leaf in leaves.items()}
    for path in sorted(expected.keys() | present.keys()):
        if expected.get(path) != present.get(path):
            raise ValueError(
                f"{path} has shape {present.get(path)}, a {model.config.family} config "
                f"expects {expected.get(path)}; save it as a checkpoint instead"
            )


def _whole_shape(w) -> tuple[int, ...]:
    """Leading axes (experts) and logical shape of an array or a weight type."""
    shape = jax.eval_shape(materialize, w).shape if isinstance(w, Weight) else w.shape
    return tuple(shape)


def halves(count: int, head_dim: int) -> np.ndarray:
    """The order of ``count`` channels in which pairs of neighbours become halves:
    within each head 0, 2, 4 ... and then 1, 3, 5 ...
    """
    return np.arange(count).reshape(-1, head_dim // 2, 2).swapaxes(-1, -2).reshape(-1)


def paired_channels(config: Transformer) -> dict[str, int]:
    """Modules whose outputs are rotary pairs of neighbours, with their head's size."""
    found: dict[str, int] = {}
    for i, layer in enumerate(config.layers):
        rope = layer.attention.rope if layer.attention else None
        if rope is None or not rope.interleaved:
            continue
        if rope.fraction != 1.0:
            raise ValueError("interleaved rotary embedding of a part of the head")
        for name in ("q", "k", "q_norm", "k_norm"):
            found[f"layers.{i}.attn.{name}"] = layer.attention.head_dim
    return found


def with_pairs(config: Transformer, interleaved: bool) -> Transformer:
    """The same configuration with rotary pairs of neighbours, or in halves."""

    def changed(layer):
        if layer.attention is None or layer.attention.rope is None:
            return layer
        rope = dataclasses.replace(layer.attention.rope, interleaved=interleaved)
        attention = dataclasses.replace(layer.attention, rope=rope)
        return dataclasses.replace(layer, attention=attention)

    return dataclasses.replace(config, layers=tuple(map(changed, config.layers)))


def rotary_halves(model: Model) -> Model:
    """The same function with rotary pairs in halves: q and k (and their norms) permute.

    The scores are sums over channels, so a permutation shared by q and k leaves them.
    """
    params, pairs = model.params, paired_channels(model.config)
    for path, leaf in named_leaves(params).items():
        module = path.rpartition(".")[0]
        if module in pairs:
            order = halves(leaf.shape[-1], pairs[module])
            params = put(params, path, leaf[..., order])
    return model.replace(params=params, config=with_pairs(model.config, False))
