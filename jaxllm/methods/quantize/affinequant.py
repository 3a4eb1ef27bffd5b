"""AffineQuant: OmniQuant with an affine map in each head in place of a scale."""

from jaxllm.core.affine import affine
from jaxllm.core.card import Card
from jaxllm.core.compose import transform
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.learned import learn
from jaxllm.core.reconstruct import clipping

card = Card(
    "AffineQuant",
    paper="arXiv:2403.12544",
    composes="first of the weight methods: it changes dense weights, then rounds",
)


@transform
def affinequant(
    bits: int = 4,
    group_size: int | None = 128,
    activation_bits: int | None = None,
    epochs: int = 20,
    rates: tuple[float, float] = (5e-3, 1e-2),
):
    """min |f(X W) - f(Q(X A^-1) Q(A W))|^2 block by block, A learned (eq. 2).

    A is a matrix in each head of the values, its band growing with the epochs (the
    gradual mask, eq. 6), and diagonal behind norms, where a full one would stay online;
    the paper keeps that one for weights alone. Shift and clipping are OmniQuant's.
    """
    format = None if activation_bits is None else ActivationFormat(activation_bits)
    return learn(
        clipping(bits, group_size),
        affine(),
        activations=format,
        epochs=epochs,
        rates=rates,
    )
