"""Kronecker (Hadamard or learned) transform of x, then codes with a scale per token."""

from __future__ import annotations

from pallas_kernels.hadamard_quantize import gpu, tpu
from pallas_kernels.hadamard_quantize.cases import CASES
from pallas_kernels.hadamard_quantize.reference import hadamard_quantize
from pallas_kernels.op import Op
from pallas_kernels.partition import Layout

KERNELS = {"tpu": tpu.hadamard_quantize, "gpu": gpu.hadamard_quantize}
LAYOUT = Layout(("*.", "..", ".."), ("*.", "*."))  # a scale needs its whole row

op = Op(
    "hadamard_quantize", hadamard_quantize, KERNELS, CASES, layout=lambda *_: LAYOUT
)
