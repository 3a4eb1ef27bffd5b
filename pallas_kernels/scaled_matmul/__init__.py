"""y = x W for 8-bit codes on both sides: integer or float8 products, float scales."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.scaled_matmul import gpu, tpu
from pallas_kernels.scaled_matmul.cases import CASES
from pallas_kernels.scaled_matmul.reference import scaled_matmul

KERNELS = {"gpu": gpu.scaled_matmul, "tpu": tpu.scaled_matmul}
LAYOUT = Layout(("*i", "oi", "*.", "oi"), "*o")

op = Op("scaled_matmul", scaled_matmul, KERNELS, CASES, layout=lambda *_: LAYOUT)
