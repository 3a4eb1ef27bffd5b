"""A model in the formats of others: Hugging Face folders, and compressed exchange."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxllm import checkpoint, methods
from jaxllm.core import weights
from jaxllm.core.model import Model
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.experiment.vocabulary import vocabulary
from jaxllm.models import exchange, hub


def export(
    uri: str,
    path: str,
    dense: bool = False,
    format: str | None = None,
    round_to: str | None = None,
) -> None:
    """Write the model saved at ``uri`` in another format, tokenizer included.

    Args:
      uri: A checkpoint.
      path: A new folder; for ``gguf`` a new file that ends in ``.gguf``.
      dense: Expand compressed weights first.
      format: ``gptq``, ``awq``, ``compressed-tensors``, ``gguf``, or None for a dense
        Hugging Face folder.
      round_to: ``q4_k`` rounds linear maps that are still dense (gguf).

    Raises:
      TypeError, ValueError: A weight that the format cannot express, by name.
    """
    model = checkpoint.restore(uri, resolve=methods.find)
    tokenizer = checkpoint.restore_tokenizer(uri, load_tokenizer)
    export_model(expanded(model) if dense else model, path, format, tokenizer, round_to)


def export_model(
    model: Model,
    path: str | Path,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    round_to: str | None = None,
) -> Path:
    """Write a model in memory; arguments and errors as those of ``export``."""
    if format is None and round_to is None:
        return hub.save_pretrained(model, path, tokenizer)
    if format is None:
        raise ValueError(f"round_to {round_to!r} is for format 'gguf'")
    words = None
    if format == "gguf" and tokenizer is not None:
        words = vocabulary(tokenizer, model.config.vocab_size)
    return exchange.export_model(model, path, format, tokenizer, words, round_to)


def expanded(model: Model) -> Model:
    """The same function with every weight as a dense array."""
    is_weight = lambda node: isinstance(node, weights.Weight)  # noqa: E731
    dense = lambda node: node.materialize() if is_weight(node) else node  # noqa: E731
    params = jax.tree.map(dense, model.params, is_leaf=is_weight)
    return model.replace(params=params)
