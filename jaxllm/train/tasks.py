"""Training runs from a configuration: what ``jaxllm run`` does with ``train:``."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxllm.core import spec, weights
from jaxllm.core.batch import Batch
from jaxllm.core.model import Model, combine, named_leaves
from jaxllm.data import chat
from jaxllm.data.corpora import documents
from jaxllm.data.instructions import load_conversations
from jaxllm.data.loader import Batches, batches
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from jaxllm.models import init
from jaxllm.models.hub import load_model
from jaxllm.train.config import TrainConfig
from jaxllm.train.curriculum import ShortFirst
from jaxllm.train.loop import fit
from jaxllm.train.losses import next_token
from jaxllm.train.parallel import data_mesh
from jaxllm.train.saving import ResumePoints
from jaxllm.train.state import initial_state, split_model


def run_training(
    config: TrainConfig,
    folder: str | Path,
    monitor: Any = None,
    *,
    model: Model | None = None,
) -> Model:
    """Train as configured; the log and resume points go to ``folder``.

    ``folder`` gets ``train.json`` (the configuration and the digest of the data),
    ``metrics.jsonl`` and ``checkpoints/``. Called again it goes on where it stopped,
    also with other ``steps``; a change of model, optimizer or data is refused.

    Args:
      monitor: ``core.walk.Monitor``; its ``progress`` switches the bar.
      model: Start from this instead of ``config.model``; for "lora", a model with
        adapters in it.

    Returns:
      The trained model: float32 parameters where they were trained.

    Raises:
      ValueError: A tokenizer or data that do not fit the model, or a folder of
        another run.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(config.tokenizer)
    model = starting_model(config, tokenizer, model)
    data, held_out = training_data(config, tokenizer)
    chosen = adapters(model) if config.kind == "lora" else None
    _record(folder, config, data)
    mesh = data_mesh(config.devices) if config.devices > 1 else None
    short = config.short_length
    trained, _ = fit(
        model,
        ShortFirst(data, short, config.short_steps) if short else data,
        config.make_optimizer(),
        steps=config.steps,
        loss=next_token(
            chunk=config.chunk, z=config.z, scan=config.scan, remat=config.remat
        ),
        rate=config.make_schedule(),
        trainable=chosen,
        held_out=held_out,
        eval_every=config.eval_every,
        save_every=config.save_every,
        folder=folder,
        seed=config.seed,
        accumulate=config.accumulate,
        clip=config.clip,
        policy=config.policy,
        mesh=mesh,
        progress=getattr(monitor, "progress", True),
    )
    return trained


def newest_model(
    config: TrainConfig, folder: str | Path, *, model: Model | None = None
) -> tuple[Model, int]:
    """The model at the newest resume point of a run, and its step.

    Raises:
      FileNotFoundError: The folder has no resume point.
      ValueError: It is another run's.
    """
    start = starting_model(config, load_tokenizer(config.tokenizer), model)
    chosen = adapters(start) if config.kind == "lora" else None
    mine, frozen = split_model(start, chosen)
    place = Path(folder) / "checkpoints"
    if not place.is_dir():
        raise FileNotFoundError(f"no run in {folder}: it has no folder 'checkpoints'")
    with ResumePoints(place) as points:
        state = points.restore(initial_state(mine, config.make_optimizer()))
    if state is None:
        raise FileNotFoundError(f"no resume point in {place}")
    return combine(state.params, frozen), int(state.step)


def starting_model(
    config: TrainConfig, tokenizer: Tokenizer, model: Model | None = None
) -> Model:
    """The model before training: given, loaded, or fresh."""
    if config.kind == "pretrain":
        if model is not None:
            raise ValueError("kind 'pretrain' makes its own model and takes none")
        fresh = config.architecture.build(tokenizer.vocab_size)
        return init(fresh, jax.random.key(config.seed))
    if model is None and config.model is None:
        raise ValueError(f"kind {config.kind!r} needs a model to start from")
    model = load_model(config.model) if model is None else model
    check_vocabulary(tokenizer, model.config.vocab_size)
    return model


def training_data(
    config: TrainConfig, tokenizer: Tokenizer
) -> tuple[Batches, list[Batch] | None]:
    """Training batches, and the held-out ones (``None`` without evaluation)."""
    make = _chat_batches if config.chats else _text_batches
    data, *rest = (make(config, tokenizer, *pair) for pair in _sources(config))
    if not rest:
        return data, None
    held = rest[0]
    # Rows of an evaluation are seen once: a small set has fewer batches.
    count = min(config.eval_batches, max(1, len(held.rows) // config.batch_size))
    return data, list(itertools.islice(held.steps(), count))


def check_data(config: TrainConfig) -> None:
    """Refuse sources that ``training_data`` would refuse; nothing is tokenised."""
    for source, split in _sources(config):
        if config.chats:
            _conversations(config, source, split)
        else:
            documents(source, split)


def _sources(config: TrainConfig) -> list[tuple[str, str]]:
    """(URI, split) of the training, then of the evaluation where there is one."""
    first = config.data, "train"
    if config.eval_data == "none":
        return [first]
    return [first, (config.eval_data or config.data, "eval")]


def adapters(model: Model) -> Callable[[str, Any], bool]:
    """Chooses the parameters that a ``Trainable`` weight offers.

    Raises:
      ValueError: The model has none.
    """
    is_trained = lambda x: isinstance(x, weights.Trainable)  # noqa: E731
    below: list[str] = []
    for path, node in named_leaves(model.params, is_trained).items():
        if is_trained(node):
            inner = f"{path}.inner."
            below += [f"{inner}{field}." for field in node.only] or [inner]
    if not below:
        raise ValueError(
            "kind 'lora' trains adapters, and the model has none: apply a transform "
            "such as lora(rank=8) or peqa(bits=4) first"
        )
    return lambda path, leaf: f"{path}.".startswith(tuple(below))


def _text_batches(
    config: TrainConfig, tokenizer: Tokenizer, source: str, split: str
) -> Batches:
    corpus = documents(source, split)
    return batches(
        corpus,
        tokenizer,
        config.length,
        config.batch_size,
        config.seed,
        shuffle=split == "train",
    )


def _chat_batches(
    config: TrainConfig, tokenizer: Tokenizer, source: str, split: str
) -> Batches:
    """Packed conversations."""
    every = _conversations(config, source, split)
    template = chat.PLAIN if config.template == "plain" else config.template
    rows = chat.pack_chats(every, tokenizer, config.length, template)
    return Batches(rows, config.batch_size, config.seed, shuffle=split == "train")


def _conversations(config: TrainConfig, source: str, split: str) -> list:
    """The conversations of a split; of one file every twentieth is held out."""
    every = load_conversations(source)
    if config.eval_data is None:
        held = [i % 20 == 19 for i in range(len(every))]
        wanted = split == "eval"
        every = [c for c, h in zip(every, held, strict=True) if h == wanted]
    if not every:
        raise ValueError(
            f"{source} has too few conversations to hold one of twenty out for the "
            "evaluation; give eval_data, or 'none'"
        )
    return every


def _record(folder: Path, config: TrainConfig, data: Batches) -> None:
    """Write train.json, or refuse the folder of a run on other data or of a kind."""
    path = folder / "train.json"
    digest = getattr(data.rows, "digest", None) or _digest(data)
    fields = spec.encode(config)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in ("kind", "batch_size", "length", "seed"):
            if before["config"][name] != fields[name]:
                raise ValueError(
                    f"{folder} holds a run with {name} {before['config'][name]!r}, not "
                    f"{fields[name]!r}; use another folder"
                )
        if before["data"] != digest:
            raise ValueError(f"{folder} holds a run on other data; use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"config": fields, "data": digest}, indent=1) + "\n")
    part.replace(path)


def _digest(data: Batches) -> str:
    """Content hash of packed rows (16 hex digits)."""
    total = hashlib.sha256()
    for part in (data.rows.tokens, data.rows.segments, data.rows.weights):
        total.update(part.tobytes())
    return total.hexdigest()[:16]
