"""What a training run is: a frozen dataclass that ``train:`` in YAML maps onto."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from jaxllm.models import MLP, Attention, Layer, Norm, Policy, Rope, Transformer
from jaxllm.train.optimizers import optimizer
from jaxllm.train.schedules import schedule

KINDS = ("pretrain", "continue", "instruct", "lora")
COMPUTE = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A Llama-like transformer of equal layers, for pretraining from nothing.

    Attributes:
      width, layers, heads, kv_heads, head_dim: As usual.
      hidden: Channels of the gated feed-forward part.
      theta: Base of the rotary frequencies.
      eps: Of the RMS norms.
      tied: Whether the head is the embedding.
      max_length: Positions that the model is meant for.
    """

    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 640
    theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = True
    max_length: int = 512

    def __post_init__(self):
        check_types(self)
        _check_positive(self, "width layers heads kv_heads head_dim hidden max_length")

    def build(self, vocab_size: int) -> Transformer:
        """The configuration for a vocabulary."""
        rope = Rope(theta=self.theta)
        attention = Attention(self.heads, self.kv_heads, self.head_dim, rope)
        layer = Layer(attention, MLP(self.hidden), Norm(eps=self.eps))
        return Transformer(
            vocab_size=vocab_size,
            width=self.width,
            layers=(layer,) * self.layers,
            norm=Norm(eps=self.eps),
            tied=self.tied,
            max_length=self.max_length,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      kind: "pretrain" (a fresh ``architecture``), "continue" (all parameters of
        ``model``, on text), "instruct" (all parameters, on conversations; only what
        the assistant says is a target), or "lora" (what ``Trainable`` weights
        offer: adapters, or the scales of codes; hence after a transform that put them
        in, such as lora or peqa).
      data: Corpus URI, or the conversations file of "instruct".
      steps: Optimiser steps in all.
      model: URI of the model to start from; not for "pretrain". May be left out where
        ``run_training`` is handed a model.
      architecture: Of "pretrain".
      tokenizer: Its URI.
      conversations: Whether ``data`` holds conversations (default: "instruct" does).
      template: Jinja chat template; "plain" is the built-in one for base models; left
        out, the tokenizer's.
      length, batch_size: Tokens of a row, rows of a step.
      short_length, short_steps: Rows of this length until this step (``ShortFirst``).
      accumulate: Microbatches of a step.
      optimizer, optimizer_options: Name and hyperparameters (train/optimizers.py).
      rate: Peak learning rate.
      schedule, warmup, schedule_options: Name, steps and options (train/schedules.py).
      clip: Largest gradient norm; ``None`` for no clipping.
      compute: "float32", or "bfloat16" with float32 parameters (mixed precision).
      chunk: Positions whose logits are held at once; ``None``: all.
      z: Weight of the z-loss.
      scan, remat: See ``losses.next_token``.
      devices: Devices that share the rows of a batch (data parallel).
      eval_data: Corpus URI, or conversations file, of the evaluation during training;
        left out, the "eval" split of ``data`` ("none": no evaluation).
      eval_every, eval_batches: Steps between evaluations, batches of each.
      save_every: Steps between resume points.
      seed: Of parameters and data order.

    Raises:
      ValueError, TypeError: A field out of range or of another type, named.
    """

    kind: str
    data: str
    steps: int
    model: str | None = None
    architecture: Uniform | None = None
    tokenizer: str = "builtin:tiny"
    conversations: bool | None = None
    template: str | None = None
    length: int = 512
    batch_size: int = 8
    short_length: int | None = None
    short_steps: int = 0
    accumulate: int = 1
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate: float = 1e-3
    schedule: str = "wsd"
    warmup: int = 0
    schedule_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clip: float | None = 1.0
    compute: str = "float32"
    chunk: int | None = None
    z: float = 0.0
    scan: bool = False
    remat: bool = False
    devices: int = 1
    eval_data: str | None = None
    eval_every: int = 200
    eval_batches: int = 4
    save_every: int = 200
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        _check_choice(self, "kind", KINDS)
        _check_choice(self, "compute", COMPUTE)
        names = "steps batch_size accumulate devices eval_every eval_batches save_every"
        _check_positive(self, names)
        if self.length < 2:
            raise ValueError(f"length is {self.length}, expected 2 or more tokens")
        self._check_start()
        self._check_rows()
        self.make_optimizer()

    @property
    def chats(self) -> bool:
        """Whether the data are conversations."""
        if self.conversations is None:
            return self.kind == "instruct"
        return self.conversations

    @property
    def policy(self) -> Policy:
        return Policy(param="float32", compute=self.compute)

    def make_schedule(self):
        """The schedule: step -> learning rate."""
        options = dict(self.schedule_options)
        return schedule(
            self.schedule, self.rate, self.steps, warmup=self.warmup, **options
        )

    def make_optimizer(self):
        """The optimiser, with the schedule inside."""
        return optimizer(
            self.optimizer, self.make_schedule(), **dict(self.optimizer_options)
        )

    def _check_start(self) -> None:
        fresh = self.kind == "pretrain"
        if fresh and (self.model is not None or self.architecture is None):
            raise ValueError(
                "kind 'pretrain' starts from an architecture and takes no model; "
                "to train a model further use kind 'continue'"
            )
        if not fresh and self.architecture is not None:
            raise ValueError(f"kind {self.kind!r} starts from a model, not a shape")
        if self.kind == "instruct" and self.conversations is False:
            raise ValueError("kind 'instruct' needs conversations; else use 'continue'")
        if self.template is not None and not self.chats:
            raise ValueError("a chat template needs conversations")

    def _check_rows(self) -> None:
        if self.batch_size % (self.accumulate * self.devices):
            raise ValueError(
                f"batch_size {self.batch_size} does not split over accumulate "
                f"{self.accumulate} times devices {self.devices}"
            )
        short = self.short_length
        if (short is None) != (self.short_steps == 0):
            raise ValueError("short_length and short_steps belong together")
        if short is not None and (short < 2 or self.length % short):
            raise ValueError(f"length {self.length} is no multiple of {short}")
        if short is not None and self.chats:
            raise ValueError("conversations are not cut into short rows")


def train_config(fields: Mapping[str, Any]) -> TrainConfig:
    """The run that a mapping (the YAML key ``train:``) describes.

    Raises:
      ValueError: An unknown key (with the nearest), a missing one, a bad value.
    """
    fields = dict(_known(TrainConfig, fields, "train"))
    if isinstance(fields.get("architecture"), Mapping):
        inner = _known(Uniform, fields["architecture"], "train.architecture")
        fields["architecture"] = Uniform(**inner)
    return TrainConfig(**fields)


def check_types(config) -> None:
    """Refuse a field whose value is not of its annotated type (int passes as float)."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
        kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            continue
        whole = isinstance(value, bool) and bool not in kinds
        if whole or not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} is {value!r}, expected {names}")


def _is_union(hint) -> bool:
    return not isinstance(hint, type) and type(None) in typing.get_args(hint)


def _known(kind: type, fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in fields:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {key!r} in {where}; did you mean {near!r}?")
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in fields
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return fields


def _check_choice(config, name: str, accepted: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(accepted)}")


def _check_positive(config, names: str) -> None:
    for name in names.split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected 1 or more")
