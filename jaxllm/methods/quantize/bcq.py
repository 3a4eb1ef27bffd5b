"""BCQ: weights as sums of scaled binary matrices (the weights of LUT-GEMM)."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.codebooks import DigitPlanes
from jaxllm.core.compose import compress, transform
from jaxllm.core.solvers import nearest

card = Card(
    "BCQ (LUT-GEMM)",
    paper="arXiv:2206.09557",
    claims=(Claim("bcq(2, 32)", "rtn(bits=2, group_size=22)"),),
    composes="last of the weight methods; needs no calibration",
)


@transform
def bcq(
    bits: int = 3, group_size: int | None = 128, steps: int = 20, shift: bool = False
):
    """W = sum_i alpha_i B_i (+ z), B_i in {-1, 1}, one alpha per group and plane.

    From the greedy solution (alpha = mean|r|, B = sign(r)) coefficients by least
    squares and bits by the nearest of the 2^q sums alternate (section 2.2). ``shift``
    adds the offset z that makes uniform grids a special case (section 3.1).
    """
    return compress(nearest(DigitPlanes(bits, (-1.0, 1.0), group_size, shift, steps)))
