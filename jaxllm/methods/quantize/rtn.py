"""Round to nearest: every weight to its closest grid point, one scale per group."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import parse_format
from jaxllm.core.scales import Grid, absmax, mse
from jaxllm.core.solvers import nearest

card = Card(
    "Round to nearest",
    paper="-",
    claims=(
        Claim("rtn(bits=3, group_size=32, clip=True)", "rtn(bits=3, group_size=32)"),
    ),
    composes="last of the weight methods; after rescaling, rotation or pruning",
)


@transform
def rtn(
    bits: int | None = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    format: str | None = None,
    clip: bool = False,
    correct=None,
):
    """q = round(w / s) + z per group of ``group_size`` inputs (None: per output).

    ``format`` names another number format (``e2m1``, ``nf4`` ...) instead of integers
    of ``bits``; ``clip`` searches the range with the least squared error; ``correct``
    mends the error, for instance ``low_rank(8)``.
    """
    name = format or f"{'s' if symmetric else ''}int{bits}"
    grid = Grid(parse_format(name), group_size, mse() if clip else absmax())
    return compress(nearest(grid), correct=correct)
