"""SmoothQuant+: smooth with the one strength that suits the whole model, then round."""

import numpy as np

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, sequence, transform
from jaxllm.core.equivalences import smooth
from jaxllm.core.formats import Integer
from jaxllm.core.rescale import rescale
from jaxllm.core.scales import Grid
from jaxllm.core.search import best_of
from jaxllm.core.solvers import nearest

card = Card(
    "SmoothQuant+",
    paper="arXiv:2312.03788",
    claims=(
        Claim("smoothquant_plus(3, 32, 4)", "rtn(bits=3, group_size=32)", model="twin"),
    ),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def smoothquant_plus(
    bits: int = 4,
    group_size: int | None = 128,
    steps: int = 10,
    sites: str = "all",
):
    """s_j = max|x_j|^a / max|w_j|^(1-a), then groups of ``bits``; one a for all layers.

    a = 0, 1 / ``steps`` .. 1 is searched for the least change of the whole model's
    outputs (section 3.3), measured on its logits; the paper steps by 0.05.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}; accepted: at least 1")
    solve = nearest(Grid(Integer(bits), group_size))
    strengths = np.linspace(0.0, 1.0, steps + 1).round(6)
    return best_of(
        *(
            sequence(rescale(smooth(float(a)), sites=sites), compress(solve))
            for a in strengths
        )
    )
