"""Resource-efficient language models in JAX: compress, adapt, measure, run.

    model = jaxllm.load("builtin:tiny")
    pipeline = jaxllm.compose(wanda("2:4"), gptq(bits=4, group_size=64))
    small = pipeline(model, calibration)
    jaxllm.report(model, small, text)

Names are imported when they are first used, so that the command line starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.core.compose import compose, merge_adapters, plan, where
    from jaxllm.core.model import Model, combine, partition
    from jaxllm.core.walk import Monitor
    from jaxllm.evaluate import perplexity
    from jaxllm.experiment.notebook import (
        calibrate,
        export,
        generate,
        load,
        report,
        restore,
        save,
        tokenizer_of,
    )
    from jaxllm.methods import parse
    from pallas_kernels import backend

_PLACES = {
    "jaxllm.core.compose": ("compose", "merge_adapters", "plan", "where"),
    "jaxllm.core.model": ("Model", "combine", "partition"),
    "jaxllm.core.walk": ("Monitor",),
    "jaxllm.evaluate": ("perplexity",),
    "jaxllm.experiment.notebook": (
        "calibrate",
        "export",
        "generate",
        "load",
        "report",
        "restore",
        "save",
        "tokenizer_of",
    ),
    "jaxllm.methods": ("parse",),
    "pallas_kernels": ("backend",),
}

__all__ = [
    "Model",
    "Monitor",
    "backend",
    "calibrate",
    "combine",
    "compose",
    "export",
    "generate",
    "load",
    "merge_adapters",
    "parse",
    "partition",
    "perplexity",
    "plan",
    "report",
    "restore",
    "save",
    "tokenizer_of",
    "where",
]


def __getattr__(name: str):
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
