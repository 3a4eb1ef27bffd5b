"""FLAP: remove what fluctuates least; its mean becomes a bias."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.units import bias_fix, fluctuation, prune_units

card = Card(
    "FLAP",
    paper="arXiv:2312.11983",
    claims=(
        # The bias takes bytes: the baseline keeps more.
        Claim('flap(0.25, scope="part")', "wanda_sp(0.24)"),
    ),
    composes="first: it cuts dense weights; the result is dense for what follows",
)


@transform
def flap(sparsity: float = 0.2, scope: str = "model", bias: bool = True):
    """Drop heads and channels of least Var(x_i) |W_i|^2; b = E[x_r] W_r (eq. 3 to 5).

    Scores are standardised per part and compared in the whole model; ``scope="part"``
    takes the same share of each. Heads are removed with their key-value head; the
    authors' code also squares the scores of attention before standardising.
    """
    return prune_units(
        fluctuation(), sparsity, scope=scope, mend=bias_fix() if bias else None
    )
