"""Which implementation of an op runs: chosen by the caller, else by the device.

    with pallas_kernels.backend("strict"):      # raise where a kernel is missing
        logits = model(tokens)

The choice is part of ``jit``'s cache key: entering ``backend`` traces anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
NAMES = ("auto", "strict", "reference", *PLATFORMS)


class KernelFallback(UserWarning):
    """An op runs its plain JAX reference on a device that could have had a kernel."""


@dataclasses.dataclass(eq=False)
class Survey:
    """What has no kernel: reasons by op, as they are met while tracing."""

    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, op: str, reason: str) -> None:
        reasons = self.missing.setdefault(op, [])
        if reason not in reasons:
            reasons.append(reason)


@dataclasses.dataclass(frozen=True)
class Backend:
    """``auto``: this device's kernel, else the reference with one warning; ``strict``:
    raise in that case; ``reference``: always plain JAX; ``cpu``, ``gpu``, ``tpu``: that
    platform's kernel wherever this is traced (to compile ahead of time), raising
    ``NotImplementedError`` with the reason where it has none. ``interpret`` runs
    kernels in Pallas's interpreter, on any device.
    """

    name: str = "auto"
    interpret: bool = False
    assumed: str | None = None  # the platform that a survey asks about
    survey: Survey | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"backend {self.name!r}; accepted: {', '.join(NAMES)}")

    @property
    def platform(self) -> str:
        forced = self.name if self.name in PLATFORMS else self.assumed
        return forced or jax.default_backend()

    @property
    def strict(self) -> bool:
        return self.name in ("strict", *PLATFORMS)


_chosen = jax.make_user_context(Backend())


@contextlib.contextmanager
def backend(name: str, *, interpret: bool = False) -> Iterator[Backend]:
    """Run the ops called inside with this backend (see ``Backend``)."""
    chosen = Backend(name, interpret)
    with _chosen(chosen):
        yield chosen


@contextlib.contextmanager
def survey(platform: str | None = None) -> Iterator[Survey]:
    """Collect which ops would fall back on ``platform`` (default: this one).

    Trace inside, for instance with ``jax.eval_shape``; nothing warns or raises.
    """
    if platform not in (None, *PLATFORMS):
        raise ValueError(f"platform {platform!r}; accepted: {', '.join(PLATFORMS)}")
    found = Survey()
    with _chosen(Backend(assumed=platform, survey=found)):
        yield found


def current() -> Backend:
    """The backend in force where this is called (or traced)."""
    return _chosen.value


def fall_back(op: str, reason: str) -> None:
    """Say that ``op`` runs in plain JAX here: the caller goes on with its reference.

    A survey notes it, a CPU is silent (the reference serves CPUs), other devices warn
    once per process and reason.

    Raises:
      NotImplementedError: The backend is strict, or forced to a platform.
    """
    chosen = current()
    if chosen.survey is not None:
        if chosen.platform != "cpu":
            chosen.survey.add(op, reason)
    elif chosen.name in PLATFORMS or (chosen.strict and chosen.platform != "cpu"):
        raise NotImplementedError(reason)
    elif chosen.platform != "cpu" and chosen.name != "reference":
        warn_once(op, chosen.platform, reason)


@functools.cache
def warn_once(op: str, platform: str, reason: str) -> None:
    """Warn the first time that these arguments are seen in this process."""
    warnings.warn(
        f"{op} has no {platform} kernel here ({reason}); it runs in plain JAX; "
        "backend('strict') raises instead.",
        KernelFallback,
        stacklevel=5,
    )
