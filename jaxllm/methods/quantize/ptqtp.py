"""PTQTP: two ternary matrices with their scales per group."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.codebooks import DigitPlanes
from jaxllm.core.compose import compress, transform
from jaxllm.core.solvers import nearest

card = Card(
    "PTQTP",
    paper="arXiv:2509.16989",
    claims=(Claim("ptqtp(2, None)", "rtn(bits=3, group_size=48)"),),
    composes="last of the weight methods; needs no calibration",
)


@transform
def ptqtp(
    planes: int = 2, group_size: int | None = 128, steps: int = 50, ridge: float = 1e-6
):
    """W = alpha_1 T_1 + alpha_2 T_2, T in {-1, 0, 1}, group by group.

    Ridge regression for the coefficients and a search of all 9 pairs of trits per
    weight alternate (section 3). Five trits share a byte: 1.6 bits each. The ridge
    is fixed where the paper adapts it to the condition number.
    """
    digits = (-1.0, 0.0, 1.0)
    target = DigitPlanes(planes, digits, group_size, steps=steps, ridge=ridge)
    return compress(nearest(target))
