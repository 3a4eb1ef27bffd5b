"""VPTQ: vectors of outputs become codebook entries, input by input, with residuals."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.vectors import vectors

card = Card(
    "VPTQ",
    paper="arXiv:2409.17066",
    claims=(
        Claim("vptq(2, 6)", "rtn(bits=3)"),
        Claim("vptq(4, 8)", "gptvq(4, 8)"),
    ),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def vptq(
    length: int = 4,
    bits: int = 8,
    stages: int = 1,
    steps: int = 30,
    damping: float = 0.01,
    compensate: bool = True,
):
    """min tr((W - Q)T H (W - Q)), Q from 2^bits vectors of ``length`` outputs.

    bits stages / length bits per weight beside the codebooks. Inputs are quantized in
    turn, and later ones absorb the error of each (section 3.1). K-means weighted by
    H_ii starts the codebooks (section 3.2), ``stages`` > 1 quantizes the residual
    (3.3). Codebooks have at most 256 entries per stage (the paper: thousands);
    outlier columns with a codebook of their own are not here.
    """
    metric = gram(damping)
    return compress(
        vectors(length, bits, stages, metric, steps, compensate, across=True)
    )
