"""Low-bit matmul and sparse attention in Pallas, for GPU and TPU.

Depends on JAX alone. Each folder is one op: ``reference.py`` is its meaning in plain
JAX, ``gpu.py`` (Mosaic GPU, Hopper), ``tpu.py`` and ``cpu.py`` are its kernels,
``cases.py`` the named real shapes that feed tests, benchmarks and tuning.

    >>> import pallas_kernels
    >>> sorted(pallas_kernels.ops())  # doctest: +ELLIPSIS
    [...]
"""

from __future__ import annotations

import importlib
import pkgutil

from pallas_kernels.choice import (
    Backend,
    KernelFallback,
    Survey,
    backend,
    current,
    fall_back,
    survey,
)
from pallas_kernels.op import Case, Op

__all__ = [
    "Backend",
    "Case",
    "KernelFallback",
    "Op",
    "Survey",
    "backend",
    "current",
    "fall_back",
    "ops",
    "survey",
]


def ops() -> dict[str, Op]:
    """All ops by name: the folder is the registry; each has ``op`` in its package."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            op = importlib.import_module(f"{__name__}.{module.name}").op
            found[op.name] = op
    return found
