"""SpQR: sensitive weights stay apart; GPTQ rounds the rest on twice rounded grids."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.exempt import exempting
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram, pivots
from jaxllm.core.scales import Grid
from jaxllm.core.splits import sensitive

card = Card(
    "SpQR",
    paper="arXiv:2306.03078",
    claims=(Claim("spqr(3, 16, 3, 0.01)", "gptq(bits=3, group_size=28)"),),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def spqr(
    bits: int = 3,
    group_size: int = 16,
    statistic_bits: int = 3,
    outliers: float = 0.01,
    damping: float = 0.01,
):
    """W = S + Q: S sparse, Q in small groups whose scales and zeros have few bits.

    S takes the weights whose leaving lowers their group's error most (section 4.2);
    a share ``outliers`` of the layer where the paper has a threshold. Scales and zero
    points are rounded in sixteens of neighbouring outputs (section 4.3), here before
    the sweep, so that it sees the stored grid.
    """
    plain = Grid(Integer(bits), group_size)
    statistics = Integer(statistic_bits)
    grid = Grid(
        Integer(bits),
        group_size,
        scale_format=statistics,
        scale_block=16,
        scale_across=True,
        zero_format=statistics,
    )
    metric = gram(damping)
    split = sensitive(outliers, plain, pivots(metric))
    return compress(exempting(grid, split, metric))
