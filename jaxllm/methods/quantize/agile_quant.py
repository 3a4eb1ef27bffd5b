"""Agile-Quant: W4A8, with four bits, or nothing, for tokens that attention ignores."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, rounded_softmax, sequence, transform
from jaxllm.core.formats import ActivationFormat, Integer, Log2
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import obs
from jaxllm.core.tokens import fewer_tokens, start_attention

card = Card(
    "Agile-Quant",
    paper="arXiv:2312.05693",
    claims=(
        Claim(
            "agile_quant(group_size=None)",
            "agile_quant(group_size=None, activation_bits=4, lower=0.0)",
        ),
    ),
    composes="last: it rounds weights and inputs, and changes how many tokens pass",
)


@transform
def agile_quant(
    bits: int = 4,
    group_size: int | None = 128,
    activation_bits: int = 8,
    lower: float = 0.5,
    low_bits: int = 4,
    drop: float = 0.0,
    first: int = 1,
    score=start_attention(),
    softmax_bits: int | None = 4,
):
    """Tokens of least attention to the first one, p[i, 0], get ``low_bits`` or leave.

    Weights by GPTQ with activation order, inputs rounded per token to
    ``activation_bits``. In each layer from ``first`` on the share ``lower`` of the
    tokens enters output, up, gate and down projections in ``low_bits``, and stays low
    in later layers; the share ``drop`` leaves behind the attention (section 3.3 and
    the authors' code, whose published shares are zero). Probabilities become powers
    of two of ``softmax_bits``; the score reads them as they were. Unlike the code,
    queries, keys and values are not rounded.
    """
    rounding = ActivationFormat(activation_bits)
    solve = obs(Grid(Integer(bits), group_size), gram(), "activation")
    low = ActivationFormat(low_bits)
    body = [
        compress(solve, activations=rounding),
        fewer_tokens(score, drop, lower, low, first=first),
    ]
    if softmax_bits is not None:
        body.append(rounded_softmax(Log2(softmax_bits)))
    return sequence(*body)
