"""y = x W for a matrix of few entries, listed in segments."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.scattered_matmul import gpu, tpu
from pallas_kernels.scattered_matmul.cases import CASES
from pallas_kernels.scattered_matmul.reference import scattered_matmul

LAYOUT = Layout(
    ("*.", "."), "*."
)  # rows alone: a stripe has as many segments as it has

op = Op(
    "scattered_matmul",
    scattered_matmul,
    {"gpu": gpu.scattered_matmul, "tpu": tpu.scattered_matmul},
    CASES,
    layout=lambda *_: LAYOUT,
)
