"""DB-LLM: two bits as two independent sets of {0, 1} with a scale each."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.codebooks import DigitPlanes
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.solvers import obs

card = Card(
    "DB-LLM",
    paper="arXiv:2402.11960",
    claims=(Claim("db_llm(32)", "gptq(bits=2, group_size=22)"),),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def db_llm(group_size: int | None = 64, steps: int = 20, damping: float = 0.01):
    """W = a_1 B_1 + a_2 B_2, B in {0, 1}: flexible dual binarization (section 3.2).

    Where two-bit integers tie a_1 = -2 a_2, both are fitted per group by alternating
    least squares, inside GPTQ's sweep. The paper fits them by gradient from a
    distillation that weighs ambiguous samples (section 3.3), which is not here.
    """
    planes = DigitPlanes(2, (0.0, 1.0), group_size, steps=steps)
    return compress(obs(planes, gram(damping)))
