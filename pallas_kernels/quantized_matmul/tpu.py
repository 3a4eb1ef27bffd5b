"""TPU: codes are peeled from the stored bytes in VMEM and multiplied on the MXU."""

from __future__ import annotations

from pallas_kernels.planes import spans
from pallas_kernels.quantized_matmul.reference import check
from pallas_kernels.quantized_matmul.tpu_planes import Reading, Tuning
from pallas_kernels.quantized_matmul.tpu_product import product


def readings(bits: int, levels: tuple[float, ...] | None) -> tuple[Reading, ...]:
    """The highest plane is read signed (code - 2^(bits - 1)), the lower ones as is."""
    planes = spans(bits)
    if levels is not None:
        if len(planes) > 1 or bits > 4:
            raise NotImplementedError(f"a table of codes of {bits} bits")
        return (Reading(bits, signed=False, levels=tuple(levels)),)
    return tuple(
        Reading(part, signed=not i, factor=2.0**low)
        for i, (part, low) in enumerate(planes)
    )


def quantized_matmul(
    x,
    planes,
    scale,
    zero=None,
    low_rank=None,
    *,
    bits: int,
    block: int | None,
    levels: tuple[float, ...] | None = None,
    offset: float | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
):
    """The reference's meaning; sums are float32, products bfloat16 (or x's dtype).

    The zero point acts on the sums of x over each block, in float32: it costs a
    product with [blocks, out] instead of a subtraction per weight.
    """
    check(x, planes, scale, zero, low_rank, bits, block, levels)
    middle = 2 ** (bits - 1)
    shift = None
    if levels is None and zero is not None:

        def shift(scale, zero):
            return _wide(scale) * (middle - _wide(zero))

    elif levels is None and offset is not None and offset != middle:

        def shift(scale):
            return _wide(scale) * (middle - offset)

    return product(
        x,
        planes,
        (scale,),
        readings(bits, levels),
        block=block,
        shift=shift,
        extra=() if zero is None or levels is not None else (zero,),
        low_rank=low_rank,
        tuning=tuning,
        interpret=interpret,
    )


def _wide(a):
    return a.astype("float32")
