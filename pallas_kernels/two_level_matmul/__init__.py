"""y = x W for int8 x and 4-bit weights that an integer scale widens to int8."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.two_level_matmul import gpu, tpu
from pallas_kernels.two_level_matmul.cases import CASES
from pallas_kernels.two_level_matmul.reference import two_level_matmul

KERNELS = {"gpu": gpu.two_level_matmul, "tpu": tpu.two_level_matmul}
LAYOUT = Layout(("*i", "oi", "oi", "oi", "*.", "o."), "*o")

op = Op("two_level_matmul", two_level_matmul, KERNELS, CASES, layout=lambda *_: LAYOUT)
