"""PiSSA: the adapter starts as the principal part of the weight, the rest is frozen."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import identity
from jaxllm.core.splits import low_rank, trainable

card = Card(
    "PiSSA",
    paper="arXiv:2404.02948",
    claims=(
        Claim(
            "compose(pissa(8), nf4(group_size=32))",
            "compose(nf4(group_size=32), lora(8))",
        ),
    ),
    composes="before rounding, which then rounds the rest (over nf4 it is QPiSSA)",
)


@transform
def pissa(rank: int = 8, dtype: str = "float32"):
    """W = (W - A B) + A B with A = U_r S_r^(1/2), B = S_r^(1/2) V_r^T (equations 2-4).

    ``train`` with kind ``lora`` changes A and B only. The singular value decomposition
    is exact, where the paper's is randomised; alpha / r is one, as in the paper.
    """
    return compress(split=trainable(low_rank(rank, identity(), dtype)))
