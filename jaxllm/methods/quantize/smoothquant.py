"""SmoothQuant: move the outliers of activations into the weights, then W8A8."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, rescale, sequence, transform
from jaxllm.core.equivalences import smooth
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest

card = Card(
    "SmoothQuant",
    paper="arXiv:2211.10438",
    claims=(Claim("smoothquant(0.5)", "smoothquant(None)", model="twin"),),
    composes="first; bits=None only rescales, for other methods to follow",
)


@transform
def smoothquant(
    alpha: float | None = 0.5,
    bits: int | None = 8,
    activation_bits: int | None = 8,
    sites: str = "norm",
):
    """s_j = max|x_j|^alpha / max|w_j|^(1-alpha); x / s goes into the norm (eq. 4).

    Weights are int8 per output, activations int8 per token, multiplied as integers.
    ``bits=None`` leaves the rescaled weights dense, ``alpha=None`` leaves the
    rescaling out (plain W8A8); ``sites="all"`` also smooths what follows linear maps.
    """
    steps = [] if alpha is None else [rescale(smooth(alpha), sites=sites)]
    if bits is not None:
        format = None if activation_bits is None else ActivationFormat(activation_bits)
        grid = Grid(Integer(bits, symmetric=True))
        steps.append(compress(nearest(grid), activations=format))
    if not steps:
        raise ValueError("smoothquant(alpha=None, bits=None) does nothing")
    return sequence(*steps)
