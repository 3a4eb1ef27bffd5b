"""TPU: few rows meet the segments, many rows the dense matrix that they stand for."""

from __future__ import annotations

from pallas_kernels.mxu import dot
from pallas_kernels.scattered_matmul import tpu_dense, tpu_rows
from pallas_kernels.scattered_matmul.reference import check
from pallas_kernels.scattered_matmul.segments import Segments

FEW = 128  # rows up to which the dense matrix costs more than it saves


def scattered_matmul(x, segments: Segments, *, outputs: int, interpret: bool = False):
    """``reference.scattered_matmul``."""
    check(x, segments, outputs)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= FEW:
        y = tpu_rows.multiply(rows, segments, outputs=outputs, interpret=interpret)
    else:
        shape = rows.shape[1], outputs
        dense = tpu_dense.unpack(segments, shape, interpret=interpret)
        y = dot(rows, dense.astype(x.dtype)).astype(x.dtype)
    return y.reshape(*x.shape[:-1], outputs)
