"""OmniQuant: learned clipping of weights, learned scale and shift of activations."""

from jaxllm.core.affine import scaling
from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.learned import learn
from jaxllm.core.reconstruct import clipping

card = Card(
    "OmniQuant",
    paper="arXiv:2308.13137",
    claims=(
        Claim(
            "omniquant(4, None, 4, epochs=4, rates=(0.05, 0.05))",
            "smoothquant(0.5, bits=5, activation_bits=4)",
            model="twin",
            margin=0.05,
        ),
    ),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def omniquant(
    bits: int = 4,
    group_size: int | None = 128,
    activation_bits: int | None = None,
    let: bool = True,
    epochs: int = 20,
    rates: tuple[float, float] = (5e-3, 1e-2),
):
    """min |F(W, X) - F(Q(W; LWC, LET), Q(X; LET))|^2 block by block (eq. 1).

    LWC: each group's range is sigmoid(gamma) max and sigmoid(beta) min (eq. 2). LET
    (``let``): (x - z) / s in front of q, k, v, o, gate and up (eq. 3), folded. The
    scales between queries and keys (eq. 5) are left out: they matter to a quantized
    attention matrix only and do not pass rotary embeddings. Adam has the two
    ``rates``, for LET and LWC, and no weight decay; the best epoch is kept.
    """
    format = None if activation_bits is None else ActivationFormat(activation_bits)
    return learn(
        clipping(bits, group_size),
        scaling() if let else None,
        activations=format,
        epochs=epochs,
        rates=rates,
    )
