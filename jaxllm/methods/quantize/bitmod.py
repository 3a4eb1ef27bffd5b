"""BitMoD: each group picks its own extended 3- or 4-bit float."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import extended_float
from jaxllm.core.scales import Grid, best_table
from jaxllm.core.solvers import nearest

card = Card(
    "BitMoD",
    paper="arXiv:2411.11745",
    claims=(Claim("bitmod(3, 32)", "rtn(bits=3, group_size=32)"),),
    composes="last of the weight methods; after rescaling, rotation or pruning",
)


@transform
def bitmod(bits: int = 4, group_size: int = 128, correct=None):
    """FP3 or FP4 whose second zero is one of four special values, group by group.

    The value with the least squared error is taken (section 3.2). The choice is
    stored as a byte per group and scales as bfloat16; the paper rounds scales to
    eight bits per output and multiplies bit by bit.
    """
    grid = Grid(extended_float(bits), group_size, best_table())
    return compress(nearest(grid), correct=correct)
