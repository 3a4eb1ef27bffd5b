"""NF4: levels at the quantiles of a normal distribution, scales quantized again."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Integer, normal_float
from jaxllm.core.scales import Grid, absmax
from jaxllm.core.solvers import nearest

card = Card(
    "NF4",
    paper="arXiv:2305.14314",
    claims=(Claim("nf4(group_size=32)", 'rtn(format="e2m1", group_size=32)'),),
    composes="last of the weight methods; lora after it is QLoRA",
)


@transform
def nf4(bits: int = 4, group_size: int = 64, double_quant: bool = True, correct=None):
    """w = s q_i with q_i the quantiles of N(0, 1) scaled to [-1, 1] (section 3.1).

    ``double_quant`` stores the scales in 8 bits, 256 of them to a second scale
    (section 3.2); the paper uses FP8 after subtracting the mean of all, here it is an
    asymmetric int8 from the least to the greatest of the 256.
    """
    scale_format = Integer(8) if double_quant else None
    grid = Grid(normal_float(bits), group_size, absmax(), scale_format=scale_format)
    return compress(nearest(grid), correct=correct)
