"""LoRA: a trainable low-rank term beside a frozen weight of any type."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.splits import adapter

card = Card(
    "LoRA",
    paper="arXiv:2106.09685",
    composes="last, over dense or compressed weights (over nf4 it is QLoRA)",
)


@transform
def lora(rank: int = 8, alpha: float = 16.0, rank_stabilized: bool = False):
    """W + (alpha / r) A B with B = 0 at the start (section 4.1).

    The result computes the same function; ``train`` with kind ``lora`` changes A and
    B only, ``merge_adapters()`` adds them into dense weights.
    """
    return compress(correct=adapter(rank, alpha, rank_stabilized))
