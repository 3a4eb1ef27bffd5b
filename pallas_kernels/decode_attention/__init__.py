"""One query per sequence against a dense, paged or quantized cache."""

from __future__ import annotations

from pallas_kernels.decode_attention import gpu, tpu
from pallas_kernels.decode_attention.cases import CASES
from pallas_kernels.decode_attention.reference import QuantizedCache, decode_attention
from pallas_kernels.op import Op
from pallas_kernels.partition import Layout

__all__ = ["QuantizedCache", "op"]


def layout(args, options) -> Layout:
    """Heads and sequences; the pages of a pool belong to no sequence."""
    paged = len(args) > 4 and args[4] is not None
    cache = "..h." if paged else "b.h."
    result = ("bh.", "bh.") if options.get("sums") else "bh."
    return Layout(("bh.", cache, cache, "b", "b.", "h"), result)


op = Op(
    "decode_attention",
    decode_attention,
    {"gpu": gpu.decode_attention, "tpu": tpu.decode_attention},
    CASES,
    layout=layout,
)
