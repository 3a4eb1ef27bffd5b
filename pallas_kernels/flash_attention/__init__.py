"""Exact attention, forward and backward: causal, local, packed, with sinks."""

from __future__ import annotations

from pallas_kernels.flash_attention import cpu, gpu, tpu
from pallas_kernels.flash_attention.cases import CASES
from pallas_kernels.flash_attention.reference import flash_attention
from pallas_kernels.op import Op
from pallas_kernels.partition import Layout

KERNELS = {
    "cpu": cpu.flash_attention,
    "gpu": gpu.flash_attention,
    "tpu": tpu.flash_attention,
}

op = Op(
    "flash_attention",
    flash_attention,
    KERNELS,
    CASES,
    own_gradient=frozenset(KERNELS),
    layout=lambda *_: Layout(("b.h.", "b.h.", "b.h.", "b.", "h"), "b.h."),
)
