"""y = x W for codes that index a table of their own for every output and block."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.table_matmul import gpu, tpu
from pallas_kernels.table_matmul.cases import CASES
from pallas_kernels.table_matmul.reference import table_matmul

KERNELS = {"gpu": gpu.table_matmul, "tpu": tpu.table_matmul}
LAYOUT = Layout(("*i", "oi", "oi."), "*o")

op = Op("table_matmul", table_matmul, KERNELS, CASES, layout=lambda *_: LAYOUT)
