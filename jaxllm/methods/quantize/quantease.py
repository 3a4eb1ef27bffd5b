"""QuantEase: cyclic coordinate descent on the layer's output error."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.descent import coordinates
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid

card = Card(
    "QuantEase",
    paper="arXiv:2309.01885",
    claims=(Claim("quantease(3)", "gptq(bits=3, group_size=None)"),),
    composes="after pruning it keeps the zeros; after rescaling or rotation",
)


@transform
def quantease(
    bits: int = 4,
    group_size: int | None = None,
    sweeps: int = 24,
    outliers: float = 0.0,
    damping: float = 0.0,
):
    """q_i = snap(q_i + [H (W - Q)]_i / H_ii), input after input, ``sweeps`` times.

    No inverse is needed; scales are those of the first weights (section 3). A share
    ``outliers`` of entries becomes a sparse float part (algorithm 3).
    """
    grid = Grid(Integer(bits), group_size)
    return compress(coordinates(grid, gram(damping), sweeps, outliers))
