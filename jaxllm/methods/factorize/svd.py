"""Truncated SVD: the best matrix of a rank in the plain weight norm."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.solvers import svd as truncate

card = Card(
    "SVD",
    paper="Eckart and Young 1936, doi:10.1007/BF02288367",
    composes="on dense weights; its factors are not compressed further",
)


@transform
def svd(ratio: float | None = 0.8, rank: int | None = None):
    """W = U_r S_r VrT; ``ratio`` is the share of parameters that the factors keep."""
    return compress(truncate(rank, ratio if rank is None else None))
