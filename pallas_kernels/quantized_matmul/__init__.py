"""y = x W for packed weights of 1 to 8 bits with a scale per block of inputs."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.quantized_matmul import cpu, gpu, tpu
from pallas_kernels.quantized_matmul.cases import CASES
from pallas_kernels.quantized_matmul.reference import quantized_matmul

KERNELS = {
    "cpu": cpu.quantized_matmul,
    "gpu": gpu.quantized_matmul,
    "tpu": tpu.quantized_matmul,
}

LAYOUT = Layout(("*i", "oi", "oi", "oi", ("i.", ".o")), "*o")

op = Op("quantized_matmul", quantized_matmul, KERNELS, CASES, layout=lambda *_: LAYOUT)
