"""ABQ-LLM: any widths as sums of bit planes, with two-bit weights kept in balance."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compensation import compensated
from jaxllm.core.compose import sequence, transform
from jaxllm.core.equivalences import smooth
from jaxllm.core.formats import ActivationFormat, Integer, balanced
from jaxllm.core.inputs import round_inputs
from jaxllm.core.reconstruct import reconstruct
from jaxllm.core.rescale import rescale

card = Card(
    "ABQ-LLM",
    paper="arXiv:2408.08554",
    claims=(Claim("abq_llm(2, alpha=None, epochs=2)", "gptq(bits=2, group_size=15)"),),
    composes="first of the weight methods: it rescales dense weights, then rounds",
)


@transform
def abq_llm(
    bits: int = 2,
    activation_bits: int | None = 8,
    group_size: int | None = None,
    balance: bool = True,
    rank: int = 1,
    alpha: float | None = 0.5,
    epochs: int = 10,
    rate: float = 5e-3,
):
    """y = s_x s_w sum_i 2^i x B_i: W in binary planes B_i, x in ``activation_bits``.

    ``balance`` has the levels {-2, -1, 0, 1, 2} for two bits (section 3.3; a third
    plane). Distribution correction (section 3.2): clipping and a rank-one move of every
    weight before rounding are learned block by block, here to the least mean squared
    error (the authors' code moves only the down projections of the first three and the
    last four blocks); the paper's cosine and attention-map losses are not here, nor is
    its learned rescaling: SmoothQuant's with ``alpha`` stands for it (None: none).
    """
    format = balanced(bits) if balance else Integer(bits, symmetric=True)
    steps = [] if alpha is None else [rescale(smooth(alpha))]
    soft = compensated(format, group_size, rank)
    steps.append(reconstruct(soft, epochs=epochs, rate=rate))
    if activation_bits is not None:
        steps.append(round_inputs(ActivationFormat(activation_bits)))
    return sequence(*steps)
