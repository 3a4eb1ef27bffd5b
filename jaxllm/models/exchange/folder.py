"""Hugging Face folders with packed weights: written shard by shard, read by module."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.model import Model, get, put
from jaxllm.core.weights import Weight
from jaxllm.models.exchange.affine import Affine, Scheme, Stored, scheme_of, weight
from jaxllm.models.exchange.packing import Packing, Settings
from jaxllm.models.hub.configs import write_config_data
from jaxllm.models.hub.names import PREFIXES
from jaxllm.models.hub.plan import Entry, make_plan
from jaxllm.models.hub.pretrained import (
    QUANTIZATION,
    check_shapes,
    check_vacant,
    dense_job,
    halves,
    paired_channels,
    publish,
    read_dense,
    read_folder_config,
    rotary_halves,
    with_pairs,
)
from jaxllm.models.hub.safetensors import Tensor, open_folder

END = ".weight"


def save_folder(
    model: Model,
    folder: str | Path,
    packing: Packing,
    tokenizer=None,
    shard_bytes: float = 5e9,
) -> Path:
    """Write a model whose linear maps are packed as ``packing`` says.

    Whether the format can hold the model is found out before anything is written.

    Raises:
      FileExistsError: The folder exists and is not empty.
      TypeError, ValueError: The format cannot express a weight, or the family cannot
        express the model; names the layer, what made it and what is accepted.
    """
    check_vacant(folder)
    config = with_pairs(model.config, False)
    data, plan = write_config_data(config), make_plan(config)
    check_shapes(model, plan)
    modules = {e.theirs.removesuffix(END): s for e, s in _packed(model, plan, packing)}
    if not modules:
        raise ValueError(f"no weight is compressed, nothing to write as {packing.name}")
    linears = _linear_names(model, plan)
    dense = tuple(name for name in linears if name not in modules)
    settings = packing.settings(modules, dense)
    kind = jnp.dtype(get(model.params, "norm.scale").dtype)
    data |= {"torch_dtype": str(kind), QUANTIZATION: settings}
    jobs = [
        job
        for entry in plan.values()
        for job in _jobs(model, entry, modules, packing, settings)
    ]
    return publish(folder, data, jobs, tokenizer, shard_bytes)


def _packed(model, plan, packing: Packing) -> Iterator[tuple[Entry, Stored]]:
    """The entries whose parameters are compressed, checked."""
    pairs = paired_channels(model.config)
    for entry in plan.values():
        found = [get(model.params, part) for part in entry.parts]
        if not any(isinstance(w, Weight) for w in found):
            continue
        stored = _stored(model, entry, found, packing, pairs)
        reason = packing.refusal(stored.scheme) or packing.doubts(stored)
        if reason:
            raise ValueError(refused(model, entry.parts[0], reason, packing))
        yield entry, stored


def _stored(model, entry: Entry, found, packing: Packing, pairs) -> Stored:
    """One tensor's numbers; refuses weights that are no integers, or not alike."""
    schemes = []
    for part, w in zip(entry.parts, found, strict=True):
        try:
            schemes.append(scheme_of(w))
        except TypeError as error:
            raise TypeError(refused(model, part, str(error), packing)) from None
    first = dataclasses.replace(schemes[0], outputs=sum(s.outputs for s in schemes))
    alike = {dataclasses.replace(s, outputs=0) for s in schemes}
    path = entry.parts[0]
    if len(alike) > 1 or (len(found) > 1 and first.ordered):
        reason = f"shares a tensor with {entry.parts[1]}, which is stored otherwise"
        raise ValueError(refused(model, path, reason, packing))
    if path in ("embed.weight", "positions.table"):
        raise ValueError(refused(model, path, "is looked up by rows", packing))
    if path == "head.weight" and not packing.head:
        raise ValueError(refused(model, path, "is the head", packing))
    if entry.layout not in packing.layouts:
        raise ValueError(refused(model, path, "is stored as [in, out]", packing))
    read = functools.partial(_weights, model, entry)
    return Stored(first, read, functools.partial(_fuse, entry, pairs))


def _weights(model: Model, entry: Entry) -> list:
    found = [get(model.params, part) for part in entry.parts]
    if entry.expert is None:
        return found
    return jax.tree.map(lambda leaf: leaf[entry.expert], found)


def _fuse(entry: Entry, pairs: dict[str, int], parts: list[np.ndarray]) -> np.ndarray:
    """Arrays [..., out] of the parts as one, rotary pairs in halves."""
    turned = []
    for path, x in zip(entry.parts, parts, strict=True):
        dim = pairs.get(path.removesuffix(END))
        turned.append(x if dim is None else x[..., halves(x.shape[-1], dim)])
    return entry.fused(turned)


def refused(model: Model, path: str, reason: str, packing) -> str:
    """The message: the layer, what made it, why not, and what is accepted."""
    made = " -> ".join(map(repr, model.history.specs)) or "unknown"
    return (
        f"{path} {reason} (made by: {made}); {packing.name} accepts "
        f"{packing.accepts}. Nothing was written"
    )


def _linear_names(model: Model, plan: dict[str, Entry]) -> list[str]:
    """Their names of all linear maps that could be packed, the head's included."""
    paths = {f"{path}{END}" for path in model.config.linears()}
    paths |= set() if model.config.tied else {f"{model.config.head_path}{END}"}
    return [e.theirs.removesuffix(END) for e in plan.values() if paths & set(e.parts)]


def _jobs(model, entry: Entry, modules: Mapping[str, Stored], packing, settings):
    """(name, bytes, make) of the tensors of one entry."""
    name = entry.theirs.removesuffix(END)
    if not entry.theirs.endswith(END) or name not in modules:
        yield dense_job(_dense_halves(model, entry), entry)
        return
    stored = modules[name]
    for suffix, field in packing.fields(stored.scheme, settings).items():
        yield f"{name}.{suffix}", field.nbytes, functools.partial(field.make, stored)


def _dense_halves(model: Model, entry: Entry) -> Model:
    """The dense parameters of one entry as a model, rotary pairs in halves."""
    params: dict[str, Any] = {}
    for part in entry.parts:
        params = put(params, part, get(model.params, part))
    return rotary_halves(Model(params, model.config))


def load_packed(
    folder: str | Path, packing: Packing, settings: Settings, dtype: str = "float32"
) -> Model:
    """The model of such a folder, its packed linear maps as ``Quantized``.

    Raises:
      FileNotFoundError, ValueError: As ``load_folder``; and settings, shapes or
        numbers that the format's reader does not support.
    """
    folder = Path(folder)
    config = read_folder_config(folder, dtype)
    plan, tensors = make_plan(config), open_folder(folder)
    try:
        jobs = list(_read_jobs(plan, tensors, packing, settings))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    used = {tensor.name for job in jobs for tensor in job.tensors.values()}
    rest = {name: t for name, t in tensors.items() if name not in used}
    packed = {job.entry.theirs for job in jobs}
    plan = {name: entry for name, entry in plan.items() if name not in packed}
    params = read_dense(folder, rest, config, plan, dtype)
    return Model(_place(params, jobs, packing, settings, dtype), config)


class _Job(NamedTuple):
    """One packed module: where it goes, how it is stored, and its tensors."""

    entry: Entry
    scheme: Scheme
    tensors: dict[str, Tensor]


def _read_jobs(plan, tensors, packing: Packing, settings) -> Iterator[_Job]:
    scheme_for = packing.reader(settings)
    for name in tensors:
        stem = name.removesuffix(f".{packing.key}")
        if stem == name:
            continue
        entry = _entry(stem, plan)
        outputs = sum(shape[-1] for shape in entry.shapes)
        scheme = scheme_for(stem, entry.shapes[0][-2], outputs)
        mine = {}
        for suffix, field in packing.fields(scheme, settings).items():
            mine[suffix] = _checked(tensors, f"{stem}.{suffix}", field.shape)
        yield _Job(entry, scheme, mine)


def _entry(stem: str, plan: dict[str, Entry]) -> Entry:
    for prefix in ("", *PREFIXES):
        if entry := plan.get(f"{prefix}{stem}{END}"):
            return entry
    raise ValueError(f"unexpected packed module {stem!r}")


def _checked(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    if tensors[name].shape != shape:
        raise ValueError(
            f"tensor {name!r} is {list(tensors[name].shape)}, expected {list(shape)}"
        )
    return tensors[name]


def _place(params, jobs: list[_Job], packing: Packing, settings, dtype: str) -> dict:
    """``params`` with the packed weights; experts are stacked once all are there."""
    stacks: dict[str, dict[int, Any]] = {}
    for job in jobs:
        try:
            found = packing.read(job.scheme, job.tensors, settings)
        except ValueError as error:
            name = next(iter(job.tensors.values())).name
            raise ValueError(f"{name.rpartition('.')[0]}: {error}") from None
        for path, part in zip(job.entry.parts, _unfused(job.entry, found), strict=True):
            if job.entry.expert is None:
                params = put(params, path, weight(part, dtype))
            else:
                stacks.setdefault(path, {})[job.entry.expert] = weight(part, dtype)
    for path, experts in stacks.items():
        whole = jax.tree.map(
            lambda *x: jnp.stack(x), *(experts[i] for i in sorted(experts))
        )
        params = put(params, path, whole)
    return params


def _unfused(entry: Entry, a: Affine) -> Iterator[Affine]:
    """The numbers of each part of a fused tensor."""
    arrays = zip(*map(entry.unfused, (a.codes, a.scale, a.zero)), strict=True)
    for shape, numbers in zip(entry.shapes, arrays, strict=True):
        scheme = dataclasses.replace(a.scheme, outputs=shape[-1])
        yield Affine(scheme, *numbers, a.order)
