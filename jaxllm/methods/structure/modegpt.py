"""MoDeGPT: the Nystrom approximation of each feed-forward module."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.units import leverage, prune_units, regression

card = Card(
    "MoDeGPT",
    paper="arXiv:2408.09632",
    claims=(
        Claim("modegpt(0.25)", "where('layers.*.mlp', wanda_sp(0.25))", margin=0.05),
    ),
    composes="first: it cuts dense weights; the result is dense for what follows",
)


@transform
def modegpt(sparsity: float = 0.25, ridge: float = 0.01, refit: bool = True):
    """Keep channels S of largest [C (C + l I)^-1]_ii; W_d = (STCS)^-1 STC W_d (alg. 1).

    C = E[h hT] of the hidden channels, l = ``ridge`` x mean(diagonal). Only modules of
    the first type are done: keys and queries (CR) would need rotary pairs per head,
    values and outputs (SVD) their own head size. Every layer has the same share, where
    the paper weighs layers by their influence. ``refit=False`` only selects.
    """
    mend = regression(ridge) if refit else None
    return prune_units(leverage(ridge), sparsity, only="channels", mend=mend)
