"""y = x W for N:M sparse weights, dense or packed values beside a bit mask."""

from __future__ import annotations

from pallas_kernels.nm_matmul import gpu, tpu
from pallas_kernels.nm_matmul.cases import CASES
from pallas_kernels.nm_matmul.reference import nm_matmul
from pallas_kernels.op import Op
from pallas_kernels.partition import Layout

KERNELS = {"gpu": gpu.nm_matmul, "tpu": tpu.nm_matmul}
LAYOUT = Layout(("*i", "oi", "oi", "oi", "oi", ("i.", ".o")), "*o")

op = Op("nm_matmul", nm_matmul, KERNELS, CASES, layout=lambda *_: LAYOUT)
