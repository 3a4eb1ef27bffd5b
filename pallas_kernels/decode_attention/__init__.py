"""One query per sequence against a dense, paged or quantized cache."""

from __future__ import annotations

from pallas_kernels.decode_attention import gpu, tpu
from pallas_kernels.decode_attention.cases import CASES
from pallas_kernels.decode_attention.reference import QuantizedCache, decode_attention
from pallas_kernels.op import Op

__all__ = ["QuantizedCache", "op"]

op = Op(
    "decode_attention",
    decode_attention,
    {"gpu": gpu.decode_attention, "tpu": tpu.decode_attention},
    CASES,
)
