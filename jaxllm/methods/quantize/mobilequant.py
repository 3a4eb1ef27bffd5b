"""MobileQuant: scales, clipping and static ranges, learned through the whole model."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.reconstruct import clipping
from jaxllm.core.whole import last_hidden, learn_whole, rescaling

card = Card(
    "MobileQuant",
    paper="arXiv:2408.13933",
    claims=(
        Claim(
            "mobilequant(4, epochs=3, rates=(0.01, 0.02, 0.01))",
            "mobilequant(4, epochs=0)",
            model="twin",
            margin=0.02,
        ),
    ),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def mobilequant(
    bits: int = 4,
    activation_bits: int = 8,
    alpha: float = 0.5,
    epochs: int = 60,
    rates: tuple[float, float, float] = (1e-3, 1e-2, 1e-3),
    goal=last_hidden(),
):
    """min |F(X) - F(Q(W; s, c), Q(X; r))|^2 over s, c and r of all layers together.

    s: x / s in front of q, k, v, o, gate, up and down, folded, at first SmoothQuant's
    (``alpha``); c: the clipping of OmniQuant, one range per output; r: one static range
    per activation with a zero point, at first the largest in the calibration set. F
    gives the last block's outputs (``goal``). ``epochs=0`` leaves all as it starts.
    Adam has the three ``rates``; the best epoch is kept. Ranges are learned as
    logarithms, which the authors' rate of 1e-6 for scales does not fit. Their
    integers of 8 and 16 bits for outputs of linear maps, norms and attention, the
    scales between queries and keys that serve those, and weights of 8 bits with one
    scale per matrix are not here.
    """
    format = ActivationFormat(activation_bits, symmetric=False)
    return learn_whole(
        clipping(bits, None),
        rescaling(alpha),
        format,
        goal=goal,
        epochs=epochs,
        rates=rates,
    )
