"""Import and export of pretrained models: URIs in, Hugging Face folders out."""

from __future__ import annotations

from pathlib import Path

from jaxllm.core.model import Model
from jaxllm.models.hub.llama2c import load_llama2c, read_llama2c_config
from jaxllm.models.hub.pretrained import (
    load_folder,
    read_folder_config,
    rotary_halves,
    save_pretrained,
)
from jaxllm.models.transformer import Transformer

__all__ = [
    "load_builtin",
    "load_folder",
    "load_llama2c",
    "load_model",
    "read_config",
    "read_folder_config",
    "read_llama2c_config",
    "rotary_halves",
    "save_pretrained",
]

GGUF = ".gguf"
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("config.json", "model*.safetensors", "model.safetensors.index.json")


def load_model(uri: str | Path, dtype: str = "float32") -> Model:
    """A pretrained model.

    Args:
      uri: ``builtin:tiny``; a llama2.c ``.bin`` file; a ``.gguf`` file; a Hugging Face
        folder (GPTQ, AWQ and compressed-tensors too: their weights stay packed); or
        ``hf:owner/name`` (also ``hf://owner/name``), with ``@revision`` if wanted.
      dtype: Of parameters and activations: float32, bfloat16 or float16.

    Raises:
      FileNotFoundError: Nothing there, or a part of it is missing.
      ConnectionError: The hub cannot be reached.
      ValueError: An unsupported configuration or damaged weights; see the loaders.
    """
    uri = _checked(uri, dtype)
    if uri.startswith("builtin:"):
        return load_builtin(uri, dtype)
    path = _local(uri, WEIGHTS)
    if path.suffix == GGUF:
        from jaxllm.models.exchange import load_gguf

        return load_gguf(path, dtype)
    return load_folder(path, dtype) if path.is_dir() else load_llama2c(path, dtype)


def read_config(uri: str | Path, dtype: str = "float32") -> Transformer:
    """The architecture behind a URI, without its weights (for dry runs)."""
    uri = _checked(uri, dtype)
    if uri.startswith("builtin:"):
        return load_builtin(uri, dtype).config
    path = _local(uri, WEIGHTS[:1])
    if path.suffix == GGUF:
        from jaxllm.models.exchange import read_gguf_config

        return read_gguf_config(path, dtype)
    read = read_folder_config if path.is_dir() else read_llama2c_config
    return read(path, dtype)


def load_builtin(uri: str = "builtin:tiny", dtype: str = "float32") -> Model:
    """The model that this project trained and ships."""
    from jaxllm.models import builtin

    return builtin.load_builtin(uri, dtype)


def _checked(uri: str | Path, dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
    return str(uri)


def _local(uri: str, files: tuple[str, ...]) -> Path:
    """The folder or file of a URI; fetches ``files`` of a hub model."""
    if uri.startswith("hf:"):
        return _download(uri.removeprefix("hf:").removeprefix("//"), files)
    path = Path(uri)
    if not path.exists():
        raise FileNotFoundError(
            f"no model at {uri!r}; accepted: builtin:tiny, a Hugging Face folder, a "
            "llama2.c .bin file, a .gguf file, hf:owner/name"
        )
    return path


def _download(name: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub

    name, _, revision = name.partition("@")
    if not name.strip("/"):
        raise ValueError("'hf:' needs the name of a model: hf:owner/name")
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(files)
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConnectionError(
            f"cannot fetch the model {name!r} from the hub ({reason}); check the name "
            "and the network, or use a local folder or 'builtin:tiny'"
        ) from error
    return Path(folder)
