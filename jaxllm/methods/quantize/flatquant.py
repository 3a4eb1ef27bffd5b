"""FlatQuant: learned Kronecker transforms flatten weights and activations."""

from jaxllm.core.affine import kronecker
from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import cached, sequence, transform
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.learned import learn, learned_range
from jaxllm.core.reconstruct import clipping

card = Card(
    "FlatQuant",
    paper="arXiv:2410.09426",
    claims=(
        Claim(
            "flatquant(kv_bits=None, epochs=1)",
            "smoothquant(0.5, bits=5, activation_bits=4)",
            model="twin",
            margin=0.3,
        ),
    ),
    composes="first of the weight methods: it changes dense weights, then rounds",
)


@transform
def flatquant(
    bits: int = 4,
    activation_bits: int | None = 4,
    kv_bits: int | None = 4,
    group_size: int | None = None,
    epochs: int = 15,
    rates: tuple[float, float] = (5e-3, 5e-2),
):
    """Y = Q(X P) Q(P^-1 W), P = diag(s) (L (x) R) learned for each site (eq. 3, 4).

    The ranges of weights and inputs are learned with them, block by block. L and R stay
    online as small matrices; s and what acts within heads are folded. Adam has the two
    ``rates``, for transforms and ranges, without the paper's decay. Keys get a Hadamard
    matrix where the paper learns one, and learning does not see the cache's rounding.
    """
    inputs = None
    if activation_bits is not None:
        inputs = learned_range(ActivationFormat(activation_bits))
    body = learn(
        clipping(bits, group_size, symmetric=True),
        kronecker(),
        activations=inputs,
        epochs=epochs,
        rates=rates,
    )
    if kv_bits is None:
        return body
    format = ActivationFormat(kv_bits, symmetric=False)
    return sequence(body, cached(format, rotate=True))
