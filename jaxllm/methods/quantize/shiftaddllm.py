"""ShiftAddLLM: binary matrices with powers of two, fitted to weights and outputs."""

from jaxllm.core.card import Card
from jaxllm.core.codebooks import DigitPlanes
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.solvers import obs

card = Card(
    "ShiftAddLLM",
    paper="arXiv:2406.05981",
    composes="after rescaling or rotation; mixed() allocates its bits",
)


@transform
def shiftaddllm(
    bits: int = 3,
    group_size: int | None = 128,
    steps: int = 20,
    shift: bool = False,
    damping: float = 0.01,
):
    """W = sum_i 2^p_i B_i, B_i in {-1, 1}: products are shifts and additions.

    Coefficients minimise the weight error and are rounded to powers of two in every
    step; the errors of a group go into later inputs as in GPTQ, the output objective
    (section 4.2). Powers take a byte. For bits per layer use ``mixed``.
    """
    planes = DigitPlanes(
        bits, (-1.0, 1.0), group_size, shift, steps, dtype="float8_e8m0fnu"
    )
    return compress(obs(planes, gram(damping)))
