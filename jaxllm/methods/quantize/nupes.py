"""NUPES: integers of a power of the weights; each output has its own exponent."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import powers
from jaxllm.core.metrics import diagonal
from jaxllm.core.scales import Grid, best_table, mse
from jaxllm.core.solvers import nearest

card = Card(
    "NUPES",
    paper="arXiv:2308.05600",
    claims=(Claim("nupes(3)", "rtn(bits=3, group_size=None)"),),
    composes="last of the weight methods; after rescaling, rotation or pruning",
)
EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@transform
def nupes(bits: int = 4, group_size: int | None = None, exponents=EXPONENTS):
    """w = s sign(q) |q / q_max|^(1/a): |w|^a is rounded evenly (eq. 3).

    Exponent and range are searched per output (or group) for the least error weighted
    by E[x^2]; the paper learns one exponent per layer, and the codes, by gradient.
    """
    grid = Grid(powers(bits, tuple(exponents)), group_size, best_table(mse()))
    return compress(nearest(grid, diagonal()))
