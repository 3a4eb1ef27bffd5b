"""Block-sparse attention on Hopper: ``listed_attention``, a list a head and block."""

from __future__ import annotations

from pallas_kernels.block_sparse_attention.reference import check_blocks
from pallas_kernels.flash_attention.reference import check
from pallas_kernels.listed_attention import Tuning, attend


def block_sparse_attention(
    q,
    k,
    v,
    index,
    count,
    *,
    block_q: int,
    block_k: int,
    causal: bool = True,
    scale: float | None = None,
    soft_cap: float | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
):
    """See the reference. bfloat16 or float16; blocks of 64 or multiples of 128 rows.

    Sequences and heads are padded to whole tiles outside the kernel where they are
    not; a list must ascend.
    """
    check(q, k, v)
    check_blocks(q, k, index, count, block_q=block_q, block_k=block_k)
    return attend(q, k, v, index, count, block_q=block_q, block_k=block_k,
                  causal=causal, scale=scale, soft_cap=soft_cap, tuning=tuning,
                  interpret=interpret)  # fmt: skip
