"""Exact integer products of int8 codes with packed codes of 1 to 8 bits."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.partition import Layout
from pallas_kernels.plane_product import gpu, tpu
from pallas_kernels.plane_product.cases import CASES
from pallas_kernels.plane_product.reference import plane_product

KERNELS = {"gpu": gpu.plane_product, "tpu": tpu.plane_product}
LAYOUT = Layout(("*i", "oi", "*.", "o."), "*o")

op = Op("plane_product", plane_product, KERNELS, CASES, layout=lambda *_: LAYOUT)
