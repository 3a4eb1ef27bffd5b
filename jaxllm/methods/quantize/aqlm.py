"""AQLM: weights as sums of codebook entries, found by beam search and least squares."""

from jaxllm.core.additive import additive
from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram

card = Card(
    "AQLM",
    paper="arXiv:2401.06118",
    claims=(
        Claim("aqlm(4, 4, 2, rounds=2)", "gptq(bits=2, group_size=15)", margin=0.1),
    ),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def aqlm(
    length: int = 8,
    bits: int = 8,
    stages: int = 2,
    rounds: int = 4,
    beams: int = 4,
    steps: int = 30,
    damping: float = 0.01,
):
    """min tr((W - Q)T H (W - Q)), Q = s sum_m C_m[b_m], ``length`` inputs per code.

    ``stages`` codebooks of 2^bits entries (the paper: up to 2^16) serve a matrix, and
    each output has a scale. Beam search for the codes (section 3.2) and least squares
    for codebooks and scales (section 3.3) take turns ``rounds`` times. The paper's
    fine-tuning of whole blocks (section 3.4) is not here.
    """
    return compress(additive(length, bits, stages, gram(damping), rounds, beams, steps))
