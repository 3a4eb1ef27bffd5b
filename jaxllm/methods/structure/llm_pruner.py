"""LLM-Pruner: remove the coupled heads and channels whose loss gradient is least."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.units import prune_units, taylor

card = Card(
    "LLM-Pruner",
    paper="arXiv:2305.11627",
    claims=(
        Claim("llm_pruner(0.25)", 'wanda_sp(0.25, score="magnitude")'),
        Claim("llm_pruner(0.25)", 'wanda_sp(0.25, score="magnitude")', model="builtin"),
    ),
    composes="first: it cuts dense weights; lora after it recovers by tuning",
)


@transform
def llm_pruner(
    sparsity: float = 0.2,
    second: bool = False,
    scope: str = "part",
    skip_first: int = 0,
    skip_last: int = 0,
):
    """Drop groups of least sum |w dL/dw| (eq. 3, 5), all coupled weights together.

    ``second`` adds the Fisher diagonal (eq. 5). The paper leaves the first four and
    last two layers of LLaMA alone: ``skip_first``, ``skip_last``. Heads are removed
    with their key-value head; the LoRA recovery is the method ``lora``.
    """
    if skip_first < 0 or skip_last < 0:
        raise ValueError(f"skip {skip_first}, {skip_last}; accepted: at least 0")
    protect = (skip_first, skip_last)
    return prune_units(taylor(second), sparsity, scope=scope, protect=protect)
