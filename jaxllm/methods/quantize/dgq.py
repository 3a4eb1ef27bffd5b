"""DGQ: int4 groups inside int8 channels, so that W4A8 stays one integer product."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.channel_scales import capped
from jaxllm.core.compose import sequence, transform
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.ranges import rounded
from jaxllm.core.rescale import rescale
from jaxllm.core.two_level import dual_grained

card = Card(
    "DGQ",
    paper="arXiv:2310.04836",
    claims=(
        Claim("dgq(4, 32, 0.05)", "dgq(4, 32, None)", model="twin"),
        Claim("dgq(4, 32, 0.05)", "smoothquant(0.5, bits=5)", model="twin"),
        Claim(
            "dgq(4, 32, 0.05, static=True)",
            "dgq(4, 32, None, static=True)",
            model="twin",
            margin=0.2,
        ),
        Claim("dgq(4, 32, None, None)", "rtn(4, 32)"),
    ),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def dgq(
    bits: int = 4,
    group_size: int = 128,
    share: float | None = 0.005,
    activation_bits: int | None = 8,
    steps: int = 20,
    coarse_steps: int = 80,
    static: bool = False,
):
    """w = s1 s2_g (q - z_g) with s2_g an int8 per group, s1 a float per output.

    The channels of highest range, a ``share`` of them, are brought to the next one's
    (percentile clipping, None leaves it out), scales are searched in two phases
    (section 3.2), inputs are rounded to int8: per token, or with ``static`` to one
    range per weight, the largest magnitude in the calibration set, as in the paper.
    The authors' code caps the ranges of norm outputs and of the down projection's
    input, here of all that a producer can take.
    """
    rounding = None if activation_bits is None else ActivationFormat(activation_bits)
    solve = dual_grained(bits, group_size, steps, coarse_steps)
    smoothing = [] if share is None else [rescale(capped(share))]
    return sequence(*smoothing, *rounded(solve, rounding, static))
