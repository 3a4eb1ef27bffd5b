"""The built-in model: trained by this project, stored in bfloat16 beside the code."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import spec
from jaxllm.core.model import Model, named_leaves, put
from jaxllm.models.hub import safetensors
from jaxllm.models.transformer import Transformer, init

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "builtin"
NAMES = ("builtin:tiny",)


def load_builtin(name: str = "tiny", dtype: str = "float32") -> Model:
    """The built-in model, ``builtin:tiny`` (or ``tiny``).

    Its values are those of the bfloat16 file, also where ``dtype`` is wider: the
    float32 baseline of every report is that rounded model.

    Args:
      name: ``builtin:tiny``, ``builtin:`` or ``tiny``.
      dtype: Of parameters and activations.

    Raises:
      ValueError: Another name (the error lists the known ones), or a file that does
        not fit its configuration.
    """
    short = name.removeprefix("builtin:") or "tiny"
    if f"builtin:{short}" not in NAMES:
        raise ValueError(
            f"no built-in model {name!r}; the known ones are {', '.join(NAMES)}"
        )
    config = _with_dtype(_config(), dtype)
    model = Model(_nested(_values(), jnp.dtype(dtype)), config)
    _check(model)
    return model


def save_builtin(model: Model, folder: Path) -> None:
    """Write a trained model as ``config.json`` and ``model.safetensors`` (bfloat16)."""
    leaves = named_leaves(model.params)
    tensors = {path: np.asarray(x, jnp.bfloat16) for path, x in leaves.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    safetensors.write_file(part, tensors)
    text = json.dumps(spec.encode(_with_dtype(model.config, "float32")), indent=1)
    config = folder / "config.json.part"
    config.write_text(text + "\n", encoding="utf-8")
    for file in (part, config):
        file.replace(file.with_suffix(""))


@functools.lru_cache(maxsize=1)
def _config() -> Transformer:
    return spec.decode(json.loads((ASSETS / "config.json").read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=1)
def _values() -> dict[str, np.ndarray]:
    """The stored tensors by dotted path, in host memory."""
    found = safetensors.open_file(ASSETS / "model.safetensors")
    return {name: np.array(tensor.read()) for name, tensor in found.items()}


def _nested(values: dict[str, np.ndarray], dtype) -> dict:
    params: dict = {}
    for path, array in values.items():
        params = put(params, path, jnp.asarray(array).astype(dtype))
    return params


def _check(model: Model) -> None:
    """Refuse a weight file that does not belong to the configuration beside it."""
    wanted = jax.eval_shape(lambda: init(model.config, jax.random.key(0))).params
    shapes = lambda params: {  # noqa: E731
        path: x.shape for path, x in named_leaves(params).items()
    }
    here, there = shapes(model.params), shapes(wanted)
    if here != there:
        odd = sorted(
            k for k in here.keys() | there.keys() if here.get(k) != there.get(k)
        )
        raise ValueError(
            f"the built-in weights do not fit their configuration: {', '.join(odd)}"
        )


def _with_dtype(config: Transformer, dtype: str) -> Transformer:
    policy = dataclasses.replace(config.policy, param=dtype, compute=dtype)
    return dataclasses.replace(config, policy=policy)
