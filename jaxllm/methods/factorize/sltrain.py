"""SLTrain: a low-rank product plus a sparse part on a fixed random support."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.tensors import low_rank_plus_sparse

card = Card(
    "SLTrain",
    paper="arXiv:2406.02214",
    claims=(
        # The index of the sparse part rounds up: the baseline gets more.
        Claim("sltrain(0.8)", "svd(0.82)"),
    ),
    composes="on dense weights, before training; its parts are not compressed further",
)


@transform
def sltrain(ratio: float = 0.8, density: float = 0.03, support: str = "random"):
    """W = B A + S with S on a support drawn once (section 3.1).

    The paper trains this form from scratch; here it is fitted to a given weight, which
    is also how to begin from a pretrained model. ``support="largest"`` puts S where
    the product is worst, which the paper compares with.
    """
    return compress(low_rank_plus_sparse(ratio, density, support))
