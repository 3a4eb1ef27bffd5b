"""AWQ: scale salient channels up before rounding; a search finds the exponent."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, sequence, transform
from jaxllm.core.equivalences import searched
from jaxllm.core.formats import Integer
from jaxllm.core.rescale import rescale
from jaxllm.core.scales import Grid, absmax, mse
from jaxllm.core.solvers import nearest

card = Card(
    "AWQ",
    paper="arXiv:2306.00978",
    claims=(
        Claim("awq(bits=4, group_size=32)", "rtn(bits=4, group_size=32)", model="twin"),
        Claim("awq(bits=3, group_size=32)", "rtn(bits=3, group_size=32)", model="twin"),
    ),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def awq(
    bits: int = 4, group_size: int | None = 128, steps: int = 20, clip: bool = True
):
    """s = E|x|^a per input, a with the least output error (eq. 4, 5); then rounding.

    s is folded into the preceding norm or linear map. ``clip`` searches the range of
    each group afterwards, by weight error where the paper uses output error.
    """
    plain = Grid(Integer(bits), group_size, absmax())
    final = Grid(Integer(bits), group_size, mse() if clip else absmax())
    return sequence(rescale(searched(plain, steps)), compress(nearest(final)))
