"""Models and tokenizers by URI: hub sources, and the checkpoints of earlier runs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm import checkpoint, methods
from jaxllm.checkpoint import storage
from jaxllm.core.model import History, Model
from jaxllm.core.spec import decode
from jaxllm.core.structure import abstract
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.models import hub, init


def is_checkpoint(uri: str) -> bool:
    """Whether a URI names a jaxllm checkpoint rather than a source of the hub."""
    if uri.startswith(storage.SCHEMES):
        return True
    folder = Path(uri)
    if uri.startswith(("builtin:", "hf:")) or not folder.is_dir():
        return False
    known = {storage.MANIFEST, "arrays", "config.json"}
    found = {p.name for p in folder.iterdir()} & known
    return bool(found) and "config.json" not in found


def open_model(uri: str, dtype: str = "float32") -> Model:
    """A model of the hub, or of a checkpoint (which keeps its own data types).

    Raises:
      FileNotFoundError, ValueError, ConnectionError: As the loaders say.
    """
    if is_checkpoint(uri):
        model = checkpoint.restore(uri, resolve=methods.find)
    else:
        model = hub.load_model(uri, dtype)
    return model.replace(history=History(model.history.specs, uri))


def open_shapes(uri: str, dtype: str = "float32") -> Model:
    """The model without its weights: leaves are ``jax.ShapeDtypeStruct``."""
    if is_checkpoint(uri):
        record = checkpoint.read_manifest(uri)
        return Model(abstract(record["structure"]), decode(record["config"]))
    config = hub.read_config(uri, dtype)
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def tokenizer_uri(model: str) -> str:
    """Where the tokenizer of a model lies, as ``load_tokenizer`` understands it."""
    if is_checkpoint(model):
        return f"{model.rstrip('/')}/{storage.TOKENIZER}"
    path = Path(model)
    return str(path.parent) if path.is_file() else model


def open_tokenizer(model: str, named: str | None = None) -> Tokenizer:
    """The tokenizer that is named, else the model's own.

    Raises:
      FileNotFoundError: The model brings none.
    """
    if named is not None:
        return load_tokenizer(named)
    if not is_checkpoint(model):
        return load_tokenizer(tokenizer_uri(model))
    found = checkpoint.restore_tokenizer(model, load_tokenizer)
    if found is None:
        raise FileNotFoundError(f"{model} brings no tokenizer; name one: tokenizer=...")
    return found


def same_logits(a: Model, b: Model, tokens) -> bool:
    """Whether two models give the same logits, bit for bit."""
    run = jax.jit(lambda model, tokens: model(tokens))
    tokens = jnp.asarray(tokens, jnp.int32)
    return run(a, tokens).tobytes() == run(b, tokens).tobytes()
