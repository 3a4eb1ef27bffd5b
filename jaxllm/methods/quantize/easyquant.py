"""EasyQuant: outliers stay exact, the range of the rest is optimised, without data."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.exempt import exempting
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import identity
from jaxllm.core.scales import Grid, absmax, least_squares, mse
from jaxllm.core.splits import outliers as largest

card = Card(
    "EasyQuant",
    paper="arXiv:2403.02775",
    claims=(Claim("easyquant(3)", "rtn(bits=3, group_size=48)"),),
    composes="last of the weight methods; needs no calibration",
)


@transform
def easyquant(
    bits: int = 4,
    group_size: int | None = None,
    outliers: float = 0.01,
    steps: int = 10,
):
    """min_s |s round(w / s) - w|^2 over the weights that are no outliers (eq. 3).

    Outliers are the share ``outliers`` of largest |w| (the paper: beyond n standard
    deviations, less than 1 %), stored sparse. The paper descends the gradient in s;
    here its zeros for fixed codes, s = sum(w q) / sum(q^2), alternate with rounding,
    from the best of a grid of ranges.
    """
    rule = least_squares(mse() if steps else absmax(), max(steps, 1))
    grid = Grid(Integer(bits, symmetric=True), group_size, rule)
    split = largest(outliers, identity())
    return compress(exempting(grid, split, identity(), compensate=False))
