"""Outlier Suppression+: outlier channels are centred and shrunk, then rounded."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, sequence, transform
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.migration import migrate
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest

card = Card(
    "Outlier Suppression+",
    paper="arXiv:2304.09145",
    claims=(
        Claim(
            "outlier_suppression_plus(4, 4, 16, shift=False)",
            "smoothquant(0.5, bits=4, activation_bits=4)",
            model="twin",
            margin=0.2,
        ),
        Claim(
            "outlier_suppression_plus(4, 4, 16)",
            "smoothquant(0.5, bits=5, activation_bits=4)",
            model="twin",
            margin=0.2,
        ),
    ),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def outlier_suppression_plus(
    bits: int = 6, activation_bits: int | None = 6, steps: int = 50, shift: bool = True
):
    """x~ = (x - z) / s, W~ = s W, b~ = b + z W: z centres, s shrinks (eq. 2 to 6).

    z is the middle of each channel's range, s = max(1, max|x - z| / t) with t searched
    for the least error of the rounded layer. Weights get one scale per output, inputs
    one per token; ``shift=False`` leaves z out. The biases that carry z are stored
    beside the weights and are new in models without biases.
    """
    solve = nearest(Grid(Integer(bits, symmetric=True)))
    format = None if activation_bits is None else ActivationFormat(activation_bits)
    return sequence(
        migrate(solve, format, steps=steps, shift=shift),
        compress(solve, activations=format),
    )
