"""Which implementation of an op runs: chosen by the caller, else by the device.

    with pallas_kernels.use("strict"):      # raise where a kernel is missing
        logits = model(tokens)

The choice is part of ``jit``'s cache key: entering ``use`` traces anew.
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

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"backend {self.name!r}; accepted: {', '.join(NAMES)}")

    @property
    def platform(self) -> str:
        return self.name if self.name in PLATFORMS else jax.default_backend()

    @property
    def strict(self) -> bool:
        return self.name in ("strict", *PLATFORMS)


_chosen = jax.make_user_context(Backend())


@contextlib.contextmanager
def use(name: str, *, interpret: bool = False) -> Iterator[Backend]:
    """Run the ops called inside with this backend (see ``Backend``)."""
    backend = Backend(name, interpret)
    with _chosen(backend):
        yield backend


def current() -> Backend:
    """The backend in force where this is called (or traced)."""
    return _chosen.value


@functools.cache
def warn_once(op: str, platform: str, reason: str) -> None:
    """Say once per process that ``op`` falls back, and why."""
    warnings.warn(
        f"{op} has no {platform} kernel here ({reason}); it runs its plain JAX "
        "reference. use('strict') raises instead.",
        KernelFallback,
        stacklevel=4,
    )
