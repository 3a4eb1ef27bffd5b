"""SliM-LLM: salient groups of inputs get a bit more, others a bit less."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram, pivots
from jaxllm.core.mixtures import mixed_blocks
from jaxllm.core.scales import mse

card = Card(
    "SliM-LLM",
    paper="arXiv:2405.14917",
    claims=(Claim("slim_llm(2, 16, 0.0)", "gptq(bits=2, group_size=15)"),),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def slim_llm(
    bits: int = 2, group_size: int = 128, share: float = 0.125, damping: float = 0.01
):
    """Salience w^2 / U_ii^2 decides bits per group and weighs the scale's search.

    U is the factor of GPTQ's sweep, as in the authors' code.

    As many groups get ``bits`` + 1 as ``bits`` - 1 (section 3.2); their ``share`` is
    given, where the paper searches it by the divergence of the layer's outputs. The
    range of each group has the least salience-weighted error (section 3.3), for all
    its weights alike; then GPTQ's sweep.
    """
    metric = gram(damping)
    body = mixed_blocks(bits, group_size, share, mse(), metric, pivots(metric, True))
    return compress(body)
