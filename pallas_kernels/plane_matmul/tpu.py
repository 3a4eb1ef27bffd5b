"""TPU: the planes go through the same products as the codes of ``quantized_matmul``."""

from __future__ import annotations

from pallas_kernels.plane_matmul.reference import check
from pallas_kernels.plane_matmul.tpu_trits import trit_matmul
from pallas_kernels.quantized_matmul.tpu_planes import Reading, Tuning
from pallas_kernels.quantized_matmul.tpu_product import product

# A sign is one bit over half a step: -1/2 or +1/2, so twice that. A trit is two's
# complement in the top two bits of a byte.
READINGS = {
    "binary": Reading(1, flip=0x80, fill=0x40, factor=2.0),
    "ternary": Reading(2, flip=0, factor=1.0),
}


def plane_matmul(
    x,
    planes,
    scales,
    bias=None,
    *,
    kind: str,
    block: int | None,
    tuning: Tuning | None = None,
    interpret: bool = False,
):
    """The reference's meaning; the bias acts on the sums of x over each block."""
    check(x, planes, scales, bias, kind, block)
    if kind == "trits":
        return trit_matmul(x, planes, scales, bias, block=block, interpret=interpret)
    return product(
        x,
        planes,
        scales,
        (READINGS[kind],) * len(planes),
        block=block,
        shift=None if bias is None else lambda *arrays: arrays[-1],
        extra=() if bias is None else (bias,),
        tuning=tuning,
        interpret=interpret,
    )
