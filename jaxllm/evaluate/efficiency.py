"""What a model costs: measured bytes, bits per weight, speed, memory and arithmetic.

Nothing here is a formula of a method: bytes are those of stored leaves, speed is timed
on this device, arithmetic and memory are what the compiled program reports.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pallas_kernels
from jaxllm.core import compat, weights
from jaxllm.core.model import Model, get, named_leaves
from jaxllm.evaluate import energy
from jaxllm.generation import Sampler, loop

PARTS = ("attention", "mlp", "embeddings", "norms", "head", "other")


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of a model's stored leaves.

    Attributes:
      bytes: By part: attention, mlp, embeddings, norms, head, other.
      total: All of them.
      linear_bytes, linear_weights: Bytes and logical entries of the linear maps that
        are compressed (of all linear maps where none is).
      compressed: Number of compressed linear maps.
      parameters: Logical entries of the whole model.
    """

    bytes: dict[str, int]
    total: int
    linear_bytes: int
    linear_weights: int
    compressed: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per logical weight of the compressed linear maps."""
        return 8 * self.linear_bytes / self.linear_weights

    @property
    def bits_per_parameter(self) -> float:
        """Bits per logical parameter of the whole model."""
        return 8 * self.total / self.parameters

    def to_json(self) -> dict[str, Any]:
        bits = dict(
            bits_per_weight=self.bits_per_weight,
            bits_per_parameter=self.bits_per_parameter,
        )
        return dataclasses.asdict(self) | bits

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v:,}" for k, v in self.bytes.items() if v)
        over = "compressed" if self.compressed else "all"
        return (
            f"{self.total:,} bytes ({parts}); {self.bits_per_weight:.3f} bits per "
            f"weight of {over} linear maps, "
            f"{self.bits_per_parameter:.3f} of the whole model"
        )


def size(model: Model) -> Size:
    """Measured size of a model: the bytes of its leaves, an array shared by two parts
    counted once. Works on abstract models (``jax.eval_shape``) too.

    >>> import jax
    >>> from jaxllm.models import MLP, Attention, Layer, Transformer, init
    >>> layer = Layer(Attention(2, 2, 8), MLP(32))
    >>> model = init(Transformer(32, 16, (layer,)), jax.random.key(0))
    >>> size(model).bits_per_weight
    32.0
    """
    held = dict.fromkeys(PARTS, 0)
    packed: list[Any] = []
    seen: set[int] = set()
    entries = 0
    leaf = lambda x: isinstance(x, weights.Weight)  # noqa: E731
    for name, node in named_leaves(model.params, leaf).items():
        fresh = [x for x in jax.tree.leaves(node) if id(x) not in seen]
        seen.update(map(id, fresh))
        held[_part(name)] += weights.nbytes(fresh)
        entries += weights.size(node) if fresh else 0
        if weights.compressed(node):
            packed.append(node)
    every = (f"{path}.weight" for path in model.config.linears())
    linear = packed or [get(model.params, path) for path in every]
    count = sum(map(weights.size, linear))
    used = sum(map(weights.nbytes, linear))
    return Size(held, sum(held.values()), used, count, len(packed), entries)


def _part(name: str) -> str:
    """The part of a model that a parameter path belongs to."""
    parts = name.split(".")
    if any("norm" in part for part in parts):
        return "norms"
    found = {
        "embed": "embeddings",
        "positions": "embeddings",
        "head": "head",
        "attn": "attention",
        "mlp": "mlp",
        "moe": "mlp",
    }
    return next((found[part] for part in parts if part in found), "other")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed and memory of generation on this device.

    Attributes:
      prefill, decode: Tokens per second, medians of ``repeats`` after a warm-up.
      batch, prompt_tokens, new_tokens: The workload.
      repeats: Timed runs.
      spread: Range of the timed runs over their median, the larger of the two.
      compile_seconds: Of both programs together.
      flops_per_token: Of the prefill, by the compiler's own count (None: not given).
      peak_bytes: Largest memory, by meter: ``program`` (the compiled programs' plan:
        arguments, results and temporaries), ``device`` (its own counter), ``process``
        (peak resident set); a meter that this device lacks is absent.
      joules_per_token: Of prompts and new tokens alike, or None.
      energy_source: The meter, or why there is none.
      device: Kind of the device.
      plain: What ran in plain JAX for want of a kernel, with the reasons.
    """

    prefill: float
    decode: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    spread: float
    compile_seconds: float
    flops_per_token: float | None
    peak_bytes: dict[str, int]
    joules_per_token: float | None
    energy_source: str
    device: str
    plain: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:,.0f}, decode {self.decode:,.0f} tokens per second "
            f"on {self.device} (batch {self.batch}, {self.prompt_tokens} + "
            f"{self.new_tokens} tokens, median of {self.repeats})"
            + (f"; without a kernel: {', '.join(self.plain)}" if self.plain else "")
        )


def speed(
    model: Model,
    *,
    batch: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
) -> Speed:
    """Times greedy generation from random prompts.

    Args:
      batch: Rows.
      prompt_tokens: Tokens of a prompt; half of the model's length, at most 128, by
        default.
      new_tokens: Tokens to write; what is left, at most 64, by default.
      repeats: Timed runs, of which the median counts.

    Raises:
      ValueError: A size below 1 (two new tokens are the least: the first one belongs to
        the prefill), or more tokens than the model takes.
    """
    prompt, new = _workload(model, batch, prompt_tokens, new_tokens, repeats)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    prompts, slots = loop.pad(model, ids.tolist(), new, 0, range(batch))
    fixed = Sampler.of(vocab_size=model.config.vocab_size), loop.end_ids((), None)
    steps = np.int32(new - 1)
    start = time.perf_counter()
    read = loop.prefill.lower(model, prompts, *fixed, slots=slots).compile()
    shapes = jax.eval_shape(partial(loop.prefill, slots=slots), model, prompts, *fixed)
    write = loop.advance.lower(model, shapes, *fixed, steps).compile()
    compiled = time.perf_counter() - start

    def once() -> tuple[float, float]:
        first, state = _timed(lambda: read(model, prompts, *fixed))
        return first, _timed(lambda: write(model, state, *fixed, steps))[0]

    once()  # warm-up
    times: list[tuple[float, float]] = []
    used = energy.measure(lambda: times.extend(once() for _ in range(repeats)))
    columns = list(zip(*times, strict=True))
    prefill, decode = map(statistics.median, columns)
    flops = compat.cost_analysis(read).get("flops")
    return Speed(
        prefill=batch * prompt / prefill,
        decode=batch * (new - 1) / decode,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        repeats=repeats,
        spread=max((max(t) - min(t)) / statistics.median(t) for t in columns),
        compile_seconds=compiled,
        flops_per_token=flops / prompts.tokens.size if flops else None,
        peak_bytes=peak_memory(read, write),
        joules_per_token=used.per(batch * (prompt + new) * repeats),
        energy_source=used.source,
        device=jax.devices()[0].device_kind,
        plain=missing_kernels(model),
    )


def missing_kernels(model: Model, platform: str | None = None) -> dict[str, list[str]]:
    """What the model runs in plain JAX on ``platform`` for want of a kernel.

    Ops and weight types by name, with each reason; nothing is computed. ``platform``
    is ``gpu`` or ``tpu`` (default: this device's; a CPU misses nothing).
    """
    slots = min(256, model.config.max_length)
    cache = jax.eval_shape(lambda: model.config.empty_cache(1, slots))
    with pallas_kernels.survey(platform) as found:
        for length in (slots, 1):  # a prompt, then a step
            tokens = jax.ShapeDtypeStruct((1, length), np.int32)
            jax.eval_shape(lambda m, t, c: m(t, cache=c), model, tokens, cache)
    return found.missing


def _workload(model: Model, batch: int, prompt, new, repeats: int) -> tuple[int, int]:
    """Checked numbers of prompt and new tokens."""
    longest = model.config.max_length
    prompt = min(128, longest // 2) if prompt is None else prompt
    new = min(64, longest - prompt) if new is None else new
    if min(batch, prompt, repeats) < 1 or new < 2 or prompt + new > longest:
        raise ValueError(
            f"batch {batch}, prompt {prompt}, new {new}, repeats {repeats}: expected "
            f"at least 1, 1, 2, 1 and at most {longest} tokens in a row"
        )
    return prompt, new


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - start, out


def speed_up(before: Speed, after: Speed, noise: float = 0.05) -> str:
    """In words: how much faster ``after`` is, or that there is no speed-up here.

    Differences below ``noise`` (a fraction), or within the spread of the timed runs,
    do not count.
    """
    noise = max(noise, before.spread, after.spread)
    factors = {
        "prefill": after.prefill / before.prefill,
        "decode": after.decode / before.decode,
    }
    shown = ", ".join(f"{name} {factor:.2f}x" for name, factor in factors.items())
    faster = any(factor > 1 + noise for factor in factors.values())
    return f"speed-up: {shown}" if faster else f"no speed-up here ({shown})"


def peak_memory(*programs: Any) -> dict[str, int]:
    """Largest memory in bytes by each meter that this device has; see ``Speed``."""
    found = {"process": _resident_peak()}
    planned = [p for p in map(_planned, programs) if p is not None]
    if planned:
        found["program"] = max(planned)
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if device is not None:
        found["device"] = int(device)
    return found


def _planned(program: Any) -> int | None:
    plan = program.memory_analysis()
    if plan is None:
        return None
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes
    return int(held + plan.temp_size_in_bytes - plan.alias_size_in_bytes)


def _resident_peak() -> int:
    """Peak resident set; the unit is bytes on macOS and kilobytes elsewhere."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def cache_bytes_per_token(model: Model) -> float:
    """Bytes that the key-value cache grows by with each position of a row.

    Measured between two empty caches (of shapes alone), so that what does not grow,
    such as static scales, is not counted.
    """
    held = lambda n: weights.nbytes(  # noqa: E731
        jax.eval_shape(lambda: model.config.empty_cache(1, n))
    )
    return (held(192) - held(64)) / 128


def disk_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder (or of one file).

    Raises:
      FileNotFoundError: Nothing there.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}: cannot measure bytes on disk")
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
