"""The configuration of an experiment, from YAML and overrides."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxllm.core.compose import Transform
from jaxllm.core.spec import call, encode, variadic_name
from jaxllm.experiment.reader import join, override, parse_yaml, read, unknown

DEFAULT_MODEL = "builtin:tiny"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What transforms look at; see ``jaxllm.data.calibration.calibrate``."""

    source: str = "builtin:"
    samples: int = 64
    length: int = 256
    seed: int = 0
    batch_size: int = 8
    mode: Literal["windows", "documents"] = "windows"


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """One text and one protocol; see ``jaxllm.evaluate.perplexity``."""

    texts: str = "builtin:"
    split: str = "eval"
    protocol: Literal["windows", "strided", "documents"] = "windows"
    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected 1 or more")

    @property
    def label(self) -> str:
        return f"{self.texts}[{self.split}] {self.protocol}"


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A file of multiple-choice or generation tasks."""

    path: str
    kind: Literal["choice", "generation"] = "choice"
    name: str | None = None
    limit: int | None = None

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}, expected 1 or more, or null")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """What is measured before and after each transform."""

    perplexity: tuple[PerplexityConfig, ...] = (PerplexityConfig(),)
    tasks: tuple[TaskConfig, ...] = ()
    speed: bool = True

    def __post_init__(self):
        if not self.perplexity:
            raise ValueError("perplexity needs at least one text")


@dataclasses.dataclass(frozen=True)
class Generate:
    """A sample of the dense and of the final model."""

    prompt: str = ""
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment; ``output``/``name`` is its folder.

    ``model`` is ``builtin:tiny`` unless a pretraining makes its own. ``transforms``
    holds encoded specs (``core.spec.encode``), checked by ``load``. ``train`` is a
    ``jaxllm.train.config.TrainConfig`` and runs after the transforms. ``backend``
    ``strict`` stops where a kernel is missing, ``reference`` runs in plain JAX.
    """

    name: str
    model: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    calibration: Calibration = Calibration()
    transforms: tuple[Any, ...] = ()
    evaluate: Evaluate = Evaluate()
    generate: Generate | None = Generate()
    train: Any = None
    output: str = "runs"
    seed: int = 0
    backend: Literal["auto", "strict", "reference"] = "auto"

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*", self.name):
            raise ValueError(f"name {self.name!r}; accepted: letters, digits and _.=-")

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def data(self) -> dict[str, Any]:
        """The merged configuration as JSON data; loading it gives this experiment."""
        return encode(_plain(self))

    def __str__(self) -> str:
        return yaml.safe_dump(self.data, sort_keys=False, allow_unicode=True)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """The experiment of a YAML file with ``key=value`` overrides.

    Raises:
      FileNotFoundError: No such file.
      ValueError, TypeError: Anything unknown or of a wrong type, by its path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no experiment at {path}: expected a YAML file")
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise TypeError(f"{path} holds no mapping of keys to values")
    for assignment in overrides:
        data = override(data, assignment)
    try:
        return experiment({"name": path.stem} | data)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def experiment(data: Mapping[str, Any]) -> Experiment:
    """The experiment of merged data; transforms are built once to check them."""
    made = read(Experiment, data)
    steps = tuple(
        encode(build(spec, f"transforms.{i}")) for i, spec in enumerate(made.transforms)
    )
    return _trained(dataclasses.replace(made, transforms=steps))


def transforms(config: Experiment) -> tuple[Transform, ...]:
    """The transforms of an experiment, in order."""
    return tuple(build(t, f"transforms.{i}") for i, t in enumerate(config.transforms))


def _trained(made: Experiment) -> Experiment:
    """``train:`` as its own dataclass, beginning with the experiment's model."""
    if made.train is None:
        return dataclasses.replace(made, model=made.model or DEFAULT_MODEL)
    from jaxllm.experiment.sources import tokenizer_uri
    from jaxllm.train.config import TrainConfig

    fresh = isinstance(made.train, Mapping) and made.train.get("kind") == "pretrain"
    if fresh and (made.model is not None or made.transforms):
        raise ValueError(
            "train: pretraining makes its own model; leave out model and "
            "transforms, and name its checkpoint in another experiment"
        )
    model = None if fresh else made.model or DEFAULT_MODEL
    data = dict(made.train) if isinstance(made.train, Mapping) else made.train
    if isinstance(data, dict) and not fresh:
        if data.get("model", model) != model:
            raise ValueError("train.model: name the model at the top, as model:")
        data.setdefault("tokenizer", made.tokenizer or tokenizer_uri(model))
    train = read(TrainConfig, data, "train")
    return dataclasses.replace(made, model=model, train=train)


def build(spec: Any, path: str) -> Transform:
    """A transform from ``gptq(bits=3)`` or ``{gptq: {bits: 3}}``.

    Raises:
      ValueError, TypeError: What is wrong with the spec, with its path.
    """
    from jaxllm import methods

    try:
        text = isinstance(spec, str)
        made = methods.parse(_called(spec)) if text else _value(spec, path)
    except (ValueError, TypeError) as error:
        message = str(error)
        located = message if message.startswith(path) else f"{path}: {message}"
        raise type(error)(located) from None
    if not isinstance(made, Transform):
        raise TypeError(
            f"{path}: {spec!r} is not a transform; write a method and its arguments, "
            "such as {gptq: {bits: 4}}"
        )
    return made


def _called(text: str) -> str:
    return text if "(" in text else f"{text}()"


def _value(data: Any, path: str):
    """Mappings of one key are calls; lists become tuples; the rest stays."""
    from jaxllm import methods

    if isinstance(data, list | tuple):
        return tuple(_value(v, join(path, i)) for i, v in enumerate(data))
    if not isinstance(data, Mapping):
        return data
    if len(data) != 1:
        keys = ", ".join(map(str, data))
        raise TypeError(f"{path}: expected one method with its arguments, got {keys}")
    ((name, arguments),) = data.items()
    path = join(path, name)
    try:
        make = methods.find(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _called_with(make, arguments, path)


def _called_with(make, arguments: Any, path: str):
    """Call a maker with a mapping of arguments, a list for a variadic one, or none."""
    signature = inspect.signature(make)
    variadic, parameters = variadic_name(signature), signature.parameters
    if isinstance(arguments, list | tuple) and variadic:
        arguments = {variadic: arguments}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{path}: expected a mapping of arguments, got {arguments!r}")
    for key in arguments:
        if key not in parameters:
            raise ValueError(unknown(join(path, key), key, parameters))
    values = {k: _value(v, join(path, k)) for k, v in arguments.items()}
    try:
        return call(make, values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def _plain(value: Any):
    """Dataclasses as dictionaries, at every depth."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
