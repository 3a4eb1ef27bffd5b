"""HQQ: a real-valued zero point fitted to a heavy-tailed error, without data."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Integer
from jaxllm.core.scales import Grid, half_quadratic
from jaxllm.core.solvers import nearest

card = Card(
    "HQQ",
    paper="Badri and Shaji 2023, mobiusml.github.io/hqq_blog",
    claims=(
        # The real zero point takes two bytes: the baseline gets smaller groups.
        Claim("hqq(bits=3, group_size=32)", "rtn(bits=3, group_size=22)"),
        Claim("hqq(bits=2, group_size=32)", "rtn(bits=2, group_size=22)"),
    ),
    composes="last of the weight methods; needs no calibration",
)


@transform
def hqq(
    bits: int = 4,
    group_size: int | None = 64,
    p: float = 0.7,
    steps: int = 20,
    correct=None,
):
    """min_z |W - s (round(W / s + z) - z)|_p^p, p < 1, by half-quadratic splitting.

    The scale stays that of min and max; see ``half_quadratic`` for the update.
    """
    grid = Grid(
        Integer(bits), group_size, half_quadratic(p, steps=steps), real_zero=True
    )
    return compress(nearest(grid), correct=correct)
