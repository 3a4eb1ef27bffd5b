"""GPTVQ: vectors of inputs become codebook entries, compensated as in GPTQ."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.vectors import vectors

card = Card(
    "GPTVQ",
    paper="arXiv:2402.15319",
    claims=(Claim("gptvq(2, 6)", "rtn(bits=3, group_size=None)"),),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def gptvq(length: int = 2, bits: int = 6, steps: int = 30, damping: float = 0.01):
    """min tr((W - Q)T H (W - Q)), Q from 2^bits vectors of ``length`` inputs.

    bits / length bits per weight beside one codebook for the whole matrix, where the
    paper has one for each group of weights, normalised; k-means weighted by H_ii
    starts it. Vectors of inputs are quantized in turn, and later inputs absorb the
    error (section 3.2). The paper then tunes codebooks by gradient descent and
    compresses them (3.3), which is not here.
    """
    return compress(vectors(length, bits, 1, gram(damping), steps))
