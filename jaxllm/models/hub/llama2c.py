"""The `.bin` checkpoints of llama2.c (legacy float32 layout)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxllm.core.model import Model, put
from jaxllm.models.config import MLP, Attention, Layer, Norm, Policy, Rope
from jaxllm.models.transformer import Transformer

HEADER = ("dim", "hidden", "layers", "heads", "kv_heads", "vocabulary", "context")
LIMIT = 1 << 20  # no field of a real header is above this
VERSIONED = 0x616B3432  # "ak42" opens the later, versioned layouts


def load_llama2c(path: str | Path, dtype: str = "float32") -> Model:
    """A Llama in llama2.c's format: header of 7 int32, float32 tensors, RoPE tables.

    Rotary pairs are neighbours (``Rope.interleaved``); a negative vocabulary size
    marks an untied head. The legacy RoPE tables are skipped.

    Raises:
      FileNotFoundError: No such file.
      ValueError: Not this format, truncated, trailing bytes, or non-finite weights.
    """
    path = Path(path)
    config = read_llama2c_config(path, dtype)
    data = np.memmap(path, np.float32, "r", offset=4 * len(HEADER))
    params, at = {}, 0
    for target, shape in _layout(config):
        size = math.prod(shape)
        values = np.asarray(data[at : at + size]).reshape(shape)
        at += size
        if target is not None:
            params = _place(params, target, values, path, dtype)
    return Model(params, config)


def read_llama2c_config(path: str | Path, dtype: str = "float32") -> Transformer:
    """The configuration of a `.bin` file, whose size must match its header."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no llama2.c checkpoint at {str(path)!r}")
    header = np.fromfile(path, np.int32, len(HEADER))
    if len(header) < len(HEADER):
        raise ValueError(f"{path} is truncated: it has no header of 7 int32 values")
    if int(header[0]) == VERSIONED:
        raise ValueError(f"{path} is a versioned llama2.c file; accepted: version 0")
    fields = dict(zip(HEADER, map(int, header), strict=True))
    tied = fields["vocabulary"] > 0
    fields["vocabulary"] = abs(fields["vocabulary"])
    for name, value in fields.items():
        if not 0 < value < LIMIT:
            raise ValueError(f"{path} is no llama2.c file: its {name} is {value}")
    if fields["dim"] % fields["heads"]:
        raise ValueError(f"{path}: dim {fields['dim']} / heads {fields['heads']}")
    config = _config(fields, tied, dtype)
    expected = 4 * (len(HEADER) + sum(math.prod(s) for _, s in _layout(config)))
    if (found := path.stat().st_size) != expected:
        what = "truncated" if found < expected else "longer than its header says"
        raise ValueError(f"{path} is {what}: {found} bytes, expected {expected}")
    return config


def _config(fields: dict[str, int], tied: bool, dtype: str) -> Transformer:
    heads = fields["heads"]
    attention = Attention(
        heads=heads,
        kv_heads=fields["kv_heads"],
        head_dim=fields["dim"] // heads,
        rope=Rope(interleaved=True),
    )
    layer = Layer(attention, MLP(fields["hidden"]), Norm(eps=1e-5))
    return Transformer(
        vocab_size=fields["vocabulary"],
        width=fields["dim"],
        layers=(layer,) * fields["layers"],
        tied=tied,
        max_length=fields["context"],
        policy=Policy(dtype, dtype),
    )


def _layout(config: Transformer) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """(parameter path with ``*`` for the layer, shape) in file order; None: skipped."""
    count, width = len(config.layers), config.width
    attention, mlp = config.layers[0].attention, config.layers[0].ffn
    queries = attention.heads * attention.head_dim
    keys = attention.kv_heads * attention.head_dim
    table = config.vocab_size, width
    yield "embed.weight", table
    yield "layers.*.attn_norm.scale", (count, width)
    yield "layers.*.attn.q.weight", (count, queries, width)
    yield "layers.*.attn.k.weight", (count, keys, width)
    yield "layers.*.attn.v.weight", (count, keys, width)
    yield "layers.*.attn.o.weight", (count, width, queries)
    yield "layers.*.mlp_norm.scale", (count, width)
    yield "layers.*.mlp.gate.weight", (count, mlp.hidden, width)
    yield "layers.*.mlp.down.weight", (count, width, mlp.hidden)
    yield "layers.*.mlp.up.weight", (count, mlp.hidden, width)
    yield "norm.scale", (width,)
    yield None, (2, config.max_length, attention.head_dim // 2)
    if not config.tied:
        yield "head.weight", table


def _place(params: dict, target: str, values: np.ndarray, path: Path, dtype: str):
    """``params`` with one tensor of the file, per layer and as [in, out]."""
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: tensor {target!r} has non-finite values")
    if "*" not in target:
        return put(params, target, _dense(values, dtype))
    for i, value in enumerate(values):
        params = put(params, target.replace("*", str(i)), _dense(value, dtype))
    return params


def _dense(values: np.ndarray, dtype: str):
    return jnp.array(values.T, jnp.dtype(dtype), copy=True)
