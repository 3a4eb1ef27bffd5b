"""y = x W that reads the weights of active blocks of inputs alone."""

from __future__ import annotations

from pallas_kernels.gated_matmul import gpu, tpu
from pallas_kernels.gated_matmul.cases import CASES
from pallas_kernels.gated_matmul.reference import gated_matmul
from pallas_kernels.op import Op
from pallas_kernels.partition import Layout

KERNELS = {"tpu": tpu.gated_matmul, "gpu": gpu.gated_matmul}
LAYOUT = Layout(("*.", ".o", ".", ""), "*o")  # block numbers count all inputs

op = Op("gated_matmul", gated_matmul, KERNELS, CASES, layout=lambda *_: LAYOUT)
