"""WeLore: one threshold on normalised singular values gives every weight its rank."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.ranks import tail_ranks

card = Card(
    "WeLore",
    paper="arXiv:2407.11239",
    claims=(
        # What stays dense takes more bytes: the baseline gets as many.
        Claim("welore(0.8)", "svd(0.82)", margin=0.1),
    ),
    composes="on dense weights; what stays dense is open to later methods",
)


@transform
def welore(ratio: float = 0.8):
    """r_l = number of s_i / s_1 >= k, with one k for the model (section 3.2).

    k is the lowest that keeps the share ``ratio`` of the parameters, found exactly
    where the paper steps through values. Weights whose factors would be larger stay
    dense (its N-LRC); the tuning of the low-rank ones alone is not part of this.
    """
    return tail_ranks(ratio)
