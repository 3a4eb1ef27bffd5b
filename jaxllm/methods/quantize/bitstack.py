"""BitStack: a stack of signed low-rank blocks, as many as memory allows."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import diagonal
from jaxllm.core.stacks import signed_stack

card = Card(
    "BitStack",
    paper="arXiv:2410.23918",
    composes="after rescaling or rotation; its terms are not compressed further",
)


@transform
def bitstack(blocks: int = 4, rank: int = 16):
    """W = sum_k sign(R_k) * (A_k B_k), R_k what k - 1 blocks left (eq. 3 to 6).

    Activation-aware by sqrt(E[x^2]) per input. Every weight gets the same number of
    blocks; the paper sorts all blocks of the model by what each brings.
    """
    return compress(signed_stack(blocks, rank, diagonal()))
