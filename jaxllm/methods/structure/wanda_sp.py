"""Wanda-sp: Wanda's score summed over heads and channels, the plain baseline."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.units import coupled_norm, prune_units, salience

SCORES = {"wanda": salience, "magnitude": coupled_norm}

card = Card(
    "Wanda-sp",
    paper="arXiv:2312.11983",
    claims=(Claim("wanda_sp(0.25)", 'wanda_sp(0.25, score="magnitude")'),),
    composes="first: it cuts dense weights; the result is dense for what follows",
)


@transform
def wanda_sp(sparsity: float = 0.2, score: str = "wanda", scope: str = "part"):
    """Drop units of least sum |w_ij| |x_i|_2 (FLAP's baseline, section 4.1).

    ``score="magnitude"`` takes the sum of squares of all weights of a unit instead.
    """
    if score not in SCORES:
        raise ValueError(f"score {score!r}; accepted: {', '.join(SCORES)}")
    return prune_units(SCORES[score](), sparsity, scope=scope)
