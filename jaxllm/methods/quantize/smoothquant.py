"""SmoothQuant: move the outliers of activations into the weights, then W8A8."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import sequence, transform
from jaxllm.core.equivalences import smooth
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.ranges import rounded
from jaxllm.core.rescale import rescale
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest

card = Card(
    "SmoothQuant",
    paper="arXiv:2211.10438",
    claims=(
        Claim("smoothquant(0.5, bits=8)", "smoothquant(None, bits=8)", model="twin"),
        Claim(
            "smoothquant(0.5, bits=8, sites='all', static=True)",
            "smoothquant(None, bits=8, static=True)",
            model="twin",
            margin=0.4,
        ),
    ),
    composes="first; it only rescales, for others to follow, unless bits are given",
)


@transform
def smoothquant(
    alpha: float | None = 0.5,
    bits: int | None = None,
    activation_bits: int | None = 8,
    sites: str = "norm",
    static: bool = False,
):
    """s_j = max|x_j|^alpha / max|w_j|^(1-alpha); x / s goes into the norm (eq. 4).

    ``bits=8`` then rounds weights per output and activations per token, multiplied as
    integers (W8A8), or with ``static`` all tokens to one range per weight, found by
    calibration (O3 in table 2); ``alpha=None`` leaves the rescaling out, to compare.
    ``sites="all"`` also smooths what follows linear maps.
    """
    steps = [] if alpha is None else [rescale(smooth(alpha), sites=sites)]
    if bits is not None:
        format = None if activation_bits is None else ActivationFormat(activation_bits)
        grid = Grid(Integer(bits, symmetric=True))
        steps += rounded(nearest(grid), format, static)
    elif static:
        raise ValueError("smoothquant(static=True) rounds nothing without bits")
    if not steps:
        raise ValueError("smoothquant(alpha=None) without bits does nothing")
    return sequence(*steps)
