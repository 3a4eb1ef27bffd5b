"""Attention over listed key blocks, a list for each head and query block."""

from __future__ import annotations

from pallas_kernels.block_sparse_attention import gpu, tpu
from pallas_kernels.block_sparse_attention.blocks import block_index, top_blocks
from pallas_kernels.block_sparse_attention.cases import CASES
from pallas_kernels.block_sparse_attention.reference import block_sparse_attention
from pallas_kernels.op import Op
from pallas_kernels.partition import Layout

__all__ = ["block_index", "op", "top_blocks"]

op = Op(
    "block_sparse_attention",
    block_sparse_attention,
    {"gpu": gpu.block_sparse_attention, "tpu": tpu.block_sparse_attention},
    CASES,
    own_gradient=frozenset({"tpu"}),
    layout=lambda *_: Layout(("b.h.", "b.h.", "b.h.", "bh..", "bh."), "b.h."),
)
