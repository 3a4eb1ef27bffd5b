"""y = x W for codes that index a table of their own for every output and block."""

from __future__ import annotations

from pallas_kernels.op import Op
from pallas_kernels.table_matmul import tpu
from pallas_kernels.table_matmul.cases import CASES
from pallas_kernels.table_matmul.reference import table_matmul

op = Op("table_matmul", table_matmul, {"tpu": tpu.table_matmul}, CASES)
