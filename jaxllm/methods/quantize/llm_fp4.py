"""LLM-FP4: floats whose exponent bits and bias are searched."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import searched_float
from jaxllm.core.metrics import diagonal
from jaxllm.core.scales import Grid, best_table, mse
from jaxllm.core.solvers import nearest

card = Card(
    "LLM-FP4",
    paper="arXiv:2310.16836",
    claims=(Claim("llm_fp4(4)", "rtn(bits=4, group_size=None)"),),
    composes="last of the weight methods; after rescaling, rotation or pruning",
)


@transform
def llm_fp4(bits: int = 4, group_size: int | None = None, correct=None):
    """w = 2^-b (-1)^s 2^p (1 + m), the split of bits and the real bias b searched.

    A real bias is a real scale (eq. 4, 5): both are chosen per output (or group) for
    the least error weighted by E[x^2], where the paper searches the split per layer.
    Only weights are rounded; the paper's per-channel activation biases are not here.
    """
    grid = Grid(searched_float(bits), group_size, best_table(mse()))
    return compress(nearest(grid, diagonal()), correct=correct)
