"""y = x W for weights that are sums of scaled binary or ternary planes."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.plane_matmul import gpu, tpu
from pallas_kernels.plane_matmul.cases import CASES
from pallas_kernels.plane_matmul.reference import plane_matmul

KERNELS = {"gpu": gpu.plane_matmul, "tpu": tpu.plane_matmul}


def layout(args, options) -> Layout:
    """Five trits to a byte cannot be cut between inputs."""
    own = "o." if options["kind"] == "trits" else "oi"
    return Layout(("*." if own == "o." else "*i", own, own, own), "*o")


op = Op("plane_matmul", plane_matmul, KERNELS, CASES, layout=layout)
