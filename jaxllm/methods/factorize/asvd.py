"""ASVD: inputs are scaled by their mean magnitude before the truncation."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import absolute
from jaxllm.core.solvers import svd as truncate

card = Card(
    "ASVD",
    paper="arXiv:2312.05821",
    claims=(Claim("asvd(0.8)", "svd(0.8)"),),
    composes="on dense weights; its factors are not compressed further",
)


@transform
def asvd(ratio: float | None = 0.8, rank: int | None = None, alpha: float = 0.5):
    """W = S^-1 trunc_r(S W), S = diag(E|x_i|^alpha) (section 3.2, eq. 7).

    Every weight keeps the share ``ratio`` of its parameters; the paper searches ranks
    per layer by perplexity on the calibration data.
    """
    return compress(truncate(rank, ratio if rank is None else None, absolute(alpha)))
