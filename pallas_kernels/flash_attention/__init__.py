"""Exact attention, forward and backward: causal, local, packed, with sinks."""

from __future__ import annotations

from pallas_kernels.flash_attention import gpu, tpu
from pallas_kernels.flash_attention.cases import CASES
from pallas_kernels.flash_attention.reference import flash_attention
from pallas_kernels.op import Op

op = Op(
    "flash_attention",
    flash_attention,
    {"gpu": gpu.flash_attention, "tpu": tpu.flash_attention},
    CASES,
    own_gradient=frozenset({"gpu", "tpu"}),
)
