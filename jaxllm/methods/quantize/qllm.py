"""QLLM: outlier channels are split, alike ones merged; low-rank terms correct."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.metrics import gram
from jaxllm.core.reassembly import reassembled
from jaxllm.core.scales import Grid, mse
from jaxllm.core.solvers import nearest
from jaxllm.core.splits import low_rank

card = Card(
    "QLLM",
    paper="arXiv:2310.08041",
    claims=(
        Claim(
            "qllm(4, 4, 0.4, 0, 40)",
            "smoothquant(None, bits=5, activation_bits=4)",
            model="twin",
        ),
    ),
    composes="after rescaling; last of the weight methods",
)


@transform
def qllm(
    bits: int = 4,
    activation_bits: int = 4,
    ratio: float = 0.1,
    rank: int = 4,
    steps: int = 20,
    damping: float = 0.01,
):
    """x_i w_i = sum of T parts (x_i / T) w_i for outliers; alike channels share one.

    The number of channels stays (section 4.1). Weights have one scale per output,
    inputs one per token. A low-rank term mends the error that is left (section 4.2):
    here in closed form and kept beside the weight in bfloat16, where the paper learns
    it block by block and fuses it. Each weight has channels of its own; the paper's
    are those of a layer, with a threshold by the rounded block's error.
    """
    grid = Grid(Integer(bits, symmetric=True), None, mse())
    format = ActivationFormat(activation_bits)
    solve = reassembled(nearest(grid), format, ratio, steps)
    return compress(solve, correct=low_rank(rank, gram(damping)) if rank else None)
