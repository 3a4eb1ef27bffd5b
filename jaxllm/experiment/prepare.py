"""Everything that can be wrong, found before any long compute, and the plan."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jaxllm.core import weights
from jaxllm.core.compose import Transform, plan
from jaxllm.core.model import Model
from jaxllm.data.calibration import Calibration, calibrate
from jaxllm.data.corpora import Corpus, documents
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from jaxllm.evaluate import load_problems, load_questions, size
from jaxllm.evaluate.perplexity import protocol_of
from jaxllm.experiment import sources
from jaxllm.experiment.schema import Experiment, transforms
from jaxllm.generation.loop import check_lengths, encode_prompts
from jaxllm.generation.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The checked inputs of a run; ``shapes`` is the dense model without weights."""

    config: Experiment
    shapes: Model
    tokenizer: Tokenizer
    transforms: tuple[Transform, ...]
    calibration: Calibration | None
    corpora: tuple[Corpus, ...]

    @property
    def pretrains(self) -> bool:
        return getattr(self.config.train, "kind", None) == "pretrain"


def prepare(config: Experiment) -> Prepared:
    """Open what a run reads, without loading weights.

    Raises:
      FileNotFoundError, ValueError, TypeError: What is missing or does not fit, named.
    """
    steps = transforms(config)
    fresh = getattr(config.train, "kind", None) == "pretrain"
    if fresh:
        tokenizer = load_tokenizer(config.train.tokenizer)
        shapes = _fresh(config.train, tokenizer)
    else:
        shapes = sources.open_shapes(config.model, config.dtype)
        tokenizer = sources.open_tokenizer(config.model, config.tokenizer)
    check_vocabulary(tokenizer, shapes.config.vocab_size)
    if _needs(steps):
        _check_length(config, shapes.config.max_length)
    _check_evaluation(config, shapes, tokenizer)
    corpora = tuple(documents(p.texts, p.split) for p in config.evaluate.perplexity)
    for task in config.evaluate.tasks:
        read = load_questions if task.kind == "choice" else load_problems
        read(task.path)
    if config.train is not None:
        from jaxllm.train.tasks import check_data

        with _at("train"):
            check_data(config.train)
    calibration = _calibration(config, tokenizer) if _needs(steps) else None
    return Prepared(config, shapes, tokenizer, steps, calibration, corpora)


def _fresh(train, tokenizer: Tokenizer) -> Model:
    from jaxllm.models import init

    architecture = train.architecture.build(tokenizer.vocab_size)
    return jax.eval_shape(lambda key: init(architecture, key), jax.random.key(0))


def _needs(steps: tuple[Transform, ...]) -> tuple[str, ...]:
    return tuple(sorted({name for step in steps for name in step.needs}))


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Names the place in the configuration that an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{place}: {error}") from None


def _check_length(config: Experiment, longest: int) -> None:
    length = config.calibration.length
    if length > longest:
        raise ValueError(
            f"calibration.length is {length}, the model's maximum length {longest}"
        )


def _check_evaluation(config: Experiment, shapes: Model, tokenizer: Tokenizer) -> None:
    """Refuse what ``perplexity`` and ``generate`` would refuse of the loaded model."""
    for i, p in enumerate(config.evaluate.perplexity):
        with _at(f"evaluate.perplexity.{i}"):
            protocol_of(shapes, p.protocol, p.window, p.stride, p.limit)
    g = config.generate
    if g is not None:
        with _at("generate"):
            Sampler.of(g.temperature, g.top_k, g.top_p)
            ids = encode_prompts(shapes, tokenizer, g.prompt)
            check_lengths(shapes, ids, g.max_new_tokens, batch_size=1)


def _calibration(config: Experiment, tokenizer: Tokenizer) -> Calibration:
    c = config.calibration
    values = dict(samples=c.samples, length=c.length, seed=c.seed)
    more = dict(batch_size=c.batch_size, mode=c.mode)
    return calibrate(c.source, tokenizer, **values, **more)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes of the leaves after one step."""

    name: str
    bytes: int
    linear_bits: float | None
    note: str = ""


def stages(prepared: Prepared) -> list[Stage]:
    """The shapes that each transform would give, traced and not computed.

    Raises:
      ValueError, TypeError: A transform that does not fit the model at its place, or
        a training of adapters without any.
    """
    model = prepared.shapes
    found = [_stage("dense", model)]
    for i, step in enumerate(prepared.transforms):
        with _at(f"transforms.{i} {step!r}"):
            try:
                model = plan(step, model, prepared.calibration)
            except jax.errors.ConcretizationTypeError:
                found.append(Stage(repr(step), 0, None, "shapes depend on values"))
                return found
        found.append(_stage(repr(step), model))
    if getattr(prepared.config.train, "kind", None) == "lora":
        from jaxllm.train.tasks import adapters

        with _at("train"):
            adapters(model)
    return found


def _stage(name: str, model: Model) -> Stage:
    measured = size(model)
    return Stage(name, measured.total, measured.bits_per_weight)


def memory(prepared: Prepared, found: list[Stage]) -> dict[str, int]:
    """Estimated bytes during the run, largest holders first.

    Two models are held at once while one becomes the next; hidden states of all
    calibration rows; the statistics of one block.
    """
    models = sorted((s.bytes for s in found), reverse=True)
    needed = {"models": sum(models[:2])}
    calibration = prepared.calibration
    if calibration is not None:
        width = prepared.shapes.config.width
        needed["hidden states"] = calibration.samples * calibration.length * width * 4
        needed["statistics of a block"] = _statistics(prepared)
    needed["host while loading"] = found[0].bytes
    return needed


def _statistics(prepared: Prepared) -> int:
    """The Gram matrices (the largest statistic) of the widest block, float32."""
    model, per_block = prepared.shapes, {}
    grams = any("gram" in step.needs for step in prepared.transforms)
    for site in model.config.sites():
        block = ".".join(site.tap.split(".")[:2])
        width = _width(model, site.consumers[0])
        entries = width * width if grams else 8 * width
        per_block[block] = per_block.get(block, 0) + 4 * entries
    return max(per_block.values(), default=0)


def _width(model: Model, path: str) -> int:
    from jaxllm.core.model import weight

    return weights.shape(weight(model, path))[0]


def describe(prepared: Prepared, folder) -> str:
    """The plan as text: steps with their sizes, memory, what will be written."""
    found = stages(prepared)
    width = max(len(s.name) for s in found)
    lines = [f"{'step':<{width}}  {'bytes':>14}  bits per weight"]
    for s in found:
        bits = "" if s.linear_bits is None else f"{s.linear_bits:.3f}"
        size = f"{s.bytes:,}" if not s.note else s.note
        lines.append(f"{s.name:<{width}}  {size:>14}  {bits}")
    lines.append("")
    lines += [f"memory, {k}: {human(v)}" for k, v in memory(prepared, found).items()]
    if prepared.calibration is not None:
        lines.append(f"calibration: {_one_line(prepared.calibration.spec)}")
    lines.append(f"device: {jax.devices()[0].device_kind} x {jax.device_count()}")
    lines.append(f"output: {folder}")
    return "\n".join(lines)


def _one_line(spec: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in spec.items())


def human(count: float) -> str:
    """Bytes for people.

    >>> human(3_500_000)
    '3.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
