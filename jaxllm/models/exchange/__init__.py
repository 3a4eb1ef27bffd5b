"""Compressed models in the formats of others: GPTQ, AWQ, compressed-tensors, GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxllm.core.model import Model
from jaxllm.models.exchange.awq import AWQ
from jaxllm.models.exchange.compressed_tensors import CompressedTensors
from jaxllm.models.exchange.folder import load_packed, save_folder
from jaxllm.models.exchange.gptq import GPTQ
from jaxllm.models.exchange.packing import Packing

__all__ = ["FORMATS", "export_model", "load_quantized"]

PACKINGS: Mapping[str, type[Packing]] = {
    kind.name: kind for kind in (GPTQ, AWQ, CompressedTensors)
}
FORMATS = tuple(PACKINGS)


def export_model(
    model: Model,
    path: str | Path,
    format: str,
    tokenizer=None,
    shard_bytes: float = 5e9,
) -> Path:
    """Write a compressed model in a format that other programs read.

    Dequantized values are those of the model, bit for bit in float32. Whether the
    format can express every weight is found out before anything is written; what is
    written appears under ``path`` when it is complete. One shard is in host memory.

    Args:
      model: What the format expresses: see the refusals.
      path: A new folder.
      format: ``gptq``.
      tokenizer: Saved beside the weights.
      shard_bytes: Largest file.

    Raises:
      FileExistsError: Something is at ``path``.
      TypeError, ValueError: An unknown format, or a weight that it cannot express;
        names the layer, what made it, and what the format accepts.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}; accepted: {', '.join(FORMATS)}")
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
