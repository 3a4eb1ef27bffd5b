"""ShiftAddLLM: binary matrices with sums of powers of two, fitted to the outputs."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.codebooks import DigitPlanes
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.solvers import obs

card = Card(
    "ShiftAddLLM",
    paper="arXiv:2406.05981",
    claims=(Claim("shiftaddllm(3, 64)", "bcq(3, 64)"),),
    composes="after rescaling or rotation; mixed() allocates its bits",
)


@transform
def shiftaddllm(
    bits: int = 3,
    group_size: int | None = 128,
    steps: int = 20,
    shift: bool = False,
    powers: int = 3,
    damping: float = 0.01,
):
    """W = sum_i alpha_i B_i, B_i in {-1, 1}: products are shifts and additions.

    Coefficients minimise the weight error and are rounded in every step to sums of
    ``powers`` signed powers of two (three in the authors' code), of which one takes a
    byte and more two; the errors of a group go into later inputs as in GPTQ, the output
    objective (section 4.2). Groups are inputs of an output, where the authors' accurate
    mode has outputs of an input. For bits per layer use ``mixed``.
    """
    planes = DigitPlanes(bits, (-1.0, 1.0), group_size, shift, steps, powers)
    return compress(obs(planes, gram(damping)))
