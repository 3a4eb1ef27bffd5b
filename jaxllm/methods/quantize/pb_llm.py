"""PB-LLM: salient weights in 8 bits, all others in one."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.exempt import exempting
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram, identity, pivots
from jaxllm.core.scales import Grid, absmax, absmean, least_squares
from jaxllm.core.splits import outliers

card = Card(
    "PB-LLM",
    paper="arXiv:2310.00034",
    claims=(Claim("pb_llm(0.1, 32)", "rtn(bits=2, group_size=15)"),),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def pb_llm(
    salient: float = 0.1,
    group_size: int | None = 128,
    by: str = "magnitude",
    damping: float = 0.01,
    compensate: bool = True,
):
    """w = alpha sign(w), alpha = mean|w|, but for a share ``salient`` in 8 bits.

    Salient are the largest |w|, or by Hessian w^2 / U_ii^2 with U of GPTQ's sweep
    (``by="hessian"``, section 3.3; so the authors' code), which compensates (section
    3.2). A bit mask tells them apart. That code also centers what it binarizes.
    """
    if by not in ("magnitude", "hessian"):
        raise ValueError(f"by {by!r}; accepted: 'magnitude', 'hessian'")
    binary = Grid(Integer(1, symmetric=True), group_size, least_squares(absmean(), 1))
    metric = gram(damping)
    score = identity() if by == "magnitude" else pivots(metric, later=True)
    split = outliers(salient, score, "float32")
    rare = Grid(Integer(8, symmetric=True), None, absmax())
    return compress(exempting(binary, split, metric, compensate, rare, identity()))
