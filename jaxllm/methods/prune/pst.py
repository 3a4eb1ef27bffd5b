"""PST: the mask is learned, through low-rank and row and column scores."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.masks import scored_mask
from jaxllm.core.reconstruct import reconstruct

card = Card(
    "PST",
    paper="arXiv:2205.11005",
    claims=(Claim("pst(0.5)", "wanda(0.5)", margin=0.05),),
    composes="before quantization, which then keeps the zeros",
)


@transform
def pst(
    sparsity: float = 0.5,
    rank: int = 8,
    share: float = 1.0,
    epochs: int = 10,
    rate: float = 2e-3,
):
    """Keep the largest |W + U V| + a (A B + R + C); learn all five (eq. 6 to 9).

    The paper learns them while it tunes for a task, with a sparsity that grows; here
    each block learns to reproduce the dense one's output at the final sparsity.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}; accepted: 0 <= sparsity < 1")
    masks = scored_mask(1 - sparsity, rank, share)
    return reconstruct(masks, epochs=epochs, rate=rate)
