"""COMET (FMPQ): activations in 4 bits, but for the channel blocks with outliers."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import cached, compress, sequence, transform
from jaxllm.core.formats import ActivationFormat, Integer, MixedActivation
from jaxllm.core.metrics import gram
from jaxllm.core.ordering import by_range
from jaxllm.core.scales import Grid, mse
from jaxllm.core.solvers import obs

card = Card(
    "COMET (FMPQ)",
    paper="arXiv:2410.12168",
    claims=(
        Claim("comet(4, 16)", "comet(4, 16, 0.0)", model="twin"),
        Claim("comet(4, 16)", "smoothquant(0.5, 5, 4)", model="twin"),
        Claim("comet(4, 16)", "quarot(rotate=False, group_size=14)", model="twin"),
    ),
    composes="after rescaling; last of the weight methods",
)


@transform
def comet(
    bits: int = 4,
    group_size: int = 128,
    share: float = 0.125,
    activation_bits: int = 4,
    wide_bits: int = 8,
    kv_bits: int | None = 4,
    damping: float = 0.01,
):
    """y = sum over blocks b of s_xb s_wb x_b W_b, x_b in 4 bits or (outliers) in 8.

    Channels are sorted by range, so that outliers share few blocks; a ``share`` of the
    blocks (rounded up) is wide, W is int4 throughout (W4Ax), each block an integer
    product of its own. Keys and values have 4 bits (KV4). The paper marks outliers by a
    threshold and moves only these; here the share is fixed, and weights go through
    GPTQ's sweep.
    """
    grid = Grid(Integer(bits, symmetric=True), group_size, mse())
    rounding = MixedActivation(
        activation_bits, block=group_size, wide=wide_bits, share=share
    )
    body = compress(by_range(obs(grid, gram(damping))), activations=rounding)
    if kv_bits is None:
        return body
    return sequence(body, cached(ActivationFormat(kv_bits, symmetric=False)))
