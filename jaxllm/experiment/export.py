"""A checkpoint as a Hugging Face folder."""

from __future__ import annotations

import jax

from jaxllm import checkpoint
from jaxllm.core import weights
from jaxllm.core.model import Model
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.models import hub


def export(uri: str, folder: str, dense: bool = False) -> None:
    """Write the model saved at ``uri`` as a Hugging Face folder, tokenizer included.

    Raises:
      TypeError: A weight is compressed and ``dense`` is false.
    """
    model = checkpoint.restore(uri)
    tokenizer = checkpoint.restore_tokenizer(uri, load_tokenizer)
    hub.save_pretrained(expanded(model) if dense else model, folder, tokenizer)


def expanded(model: Model) -> Model:
    """The same function with every weight as a dense array."""
    is_weight = lambda node: isinstance(node, weights.Weight)  # noqa: E731
    dense = lambda node: node.materialize() if is_weight(node) else node  # noqa: E731
    params = jax.tree.map(dense, model.params, is_leaf=is_weight)
    return model.replace(params=params)
