"""Compressed models in the formats of others: GPTQ, AWQ, compressed-tensors, GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxllm.core.model import Model
from jaxllm.models.exchange.awq import AWQ
from jaxllm.models.exchange.compressed_tensors import CompressedTensors
from jaxllm.models.exchange.folder import load_packed, save_folder
from jaxllm.models.exchange.gguf import load_gguf, read_gguf_config, save_gguf
from jaxllm.models.exchange.gptq import GPTQ
from jaxllm.models.exchange.packing import Packing

__all__ = [
    "FORMATS",
    "export_model",
    "load_gguf",
    "load_quantized",
    "read_gguf_config",
]

PACKINGS: Mapping[str, type[Packing]] = {
    kind.name: kind for kind in (GPTQ, AWQ, CompressedTensors)
}
FORMATS = (*PACKINGS, "gguf")


def export_model(
    model: Model,
    path: str | Path,
    format: str,
    tokenizer=None,
    vocabulary: Mapping | None = None,
    round_to: str | None = None,
    shard_bytes: float = 5e9,
) -> Path:
    """Write a compressed model in a format that other programs read.

    Dequantized values are those of the model, bit for bit in float32. Whether the
    format can express every weight is found out before anything is written; what is
    written appears under ``path`` when it is complete. One shard (GGUF: one tensor) is
    in host memory.

    Args:
      model: What the format expresses: see ``Packing.accepts`` and ``save_gguf``.
      path: A new folder, or for gguf a new file that ends in ``.gguf``.
      format: ``gptq``, ``awq``, ``compressed-tensors`` or ``gguf``.
      tokenizer: Saved beside the weights (not for gguf).
      vocabulary: The tokenizer as metadata (for gguf).
      round_to: ``q4_k`` rounds linear maps that are still dense (for gguf).
      shard_bytes: Largest file of a folder.

    Raises:
      FileExistsError: Something is at ``path``.
      TypeError, ValueError: An unknown format, or a weight that it cannot express;
        names the layer, what made it, and what the format accepts.
    """
    if format == "gguf":
        return save_gguf(model, path, vocabulary, round_to)
    if format not in PACKINGS:
        raise ValueError(f"format {format!r}; accepted: {', '.join(FORMATS)}")
    if round_to is not None:
        raise ValueError(f"round_to {round_to!r} is for gguf, not for {format}")
    return save_folder(model, path, PACKINGS[format](), tokenizer, shard_bytes)


def load_quantized(folder: str | Path, settings: Mapping, dtype: str) -> Model:
    """The model of a folder whose config.json has a ``quantization_config``.

    Raises ``ValueError`` for a method or a setting that is not supported.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method not in PACKINGS:
        some = ", ".join(PACKINGS)
        raise ValueError(f"{folder}: quant_method {method!r}; accepted: {some}")
    return load_packed(folder, PACKINGS[method](), settings, dtype)
