"""What notebooks call: the packages' functions with the model's own tokenizer."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxllm import checkpoint, methods
from jaxllm import evaluate as _evaluate
from jaxllm.core.model import History, Model
from jaxllm.data.calibration import Calibration
from jaxllm.data.calibration import calibrate as _calibrate
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.experiment.export import export_model
from jaxllm.experiment.sources import open_model, open_tokenizer
from jaxllm.generation import generate as _generate


def load(uri: str, dtype: str = "float32") -> Model:
    """A model by URI: ``builtin:tiny``, a folder, a file, ``hf:owner/name``.

    Raises:
      FileNotFoundError, ValueError, ConnectionError: Naming what is missing or wrong.
    """
    return open_model(uri, dtype)


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer that lies beside the model's source.

    Raises:
      ValueError: The model was not loaded from anywhere.
    """
    if model.history.origin is None:
        raise ValueError("this model was not loaded from a source: pass a tokenizer")
    return open_tokenizer(model.history.origin)


def calibrate(
    model: Model,
    source: str = "builtin:",
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Calibration:
    """A calibration set in the model's own tokens; ``length`` at most its context."""
    longest = model.config.max_length
    length = min(512, longest) if length is None else length
    if length > longest:
        raise ValueError(f"length {length}; the model reads at most {longest} tokens")
    return _calibrate(source, tokenizer or tokenizer_of(model), samples, length, seed)


def generate(model: Model, prompts, tokenizer: Tokenizer | None = None, **options):
    """Continuations of one prompt or several; options as ``generation.generate``."""
    return _generate(model, tokenizer or tokenizer_of(model), prompts, **options)


def report(before: Model, after, text, tokenizer: Tokenizer | None = None, **options):
    """A table of what compression cost and bought; options as ``evaluate.report``."""
    return _evaluate.report(
        before, after, text, tokenizer=tokenizer or tokenizer_of(before), **options
    )


def save(model: Model, uri: str, tokenizer: Tokenizer | None = None, **options) -> None:
    """Write a checkpoint; the tokenizer travels along where one is known."""
    checkpoint.save(model, uri, tokenizer=_known(model, tokenizer), **options)


def export(
    model: Model,
    path: str,
    format: str | None = None,
    tokenizer: Tokenizer | None = None,
    round_to: str | None = None,
) -> None:
    """Write a model for other programs: ``gptq``, ``awq``, ``compressed-tensors``,
    ``gguf``, or (None) a dense Hugging Face folder; see ``models.exchange``.
    """
    export_model(model, path, format, _known(model, tokenizer), round_to)


def _known(model: Model, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer given, else the one beside the model's source, else None."""
    if tokenizer is not None or model.history.origin is None:
        return tokenizer
    try:
        return open_tokenizer(model.history.origin)
    except FileNotFoundError:
        return None


def restore(uri: str, mesh: Mesh | None = None) -> Model:
    """The model of a checkpoint, split over a mesh by the sharding rules if given."""
    model = checkpoint.restore(uri, mesh=mesh, resolve=methods.find)
    return model.replace(history=History(model.history.specs, uri))
