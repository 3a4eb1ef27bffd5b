"""INT2.1: two-bit weights whose error a low-rank term of more bits mends."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import obs
from jaxllm.core.splits import low_rank, trainable

card = Card(
    "INT2.1",
    paper="arXiv:2306.08162",
    composes="after rescaling or rotation; training its adapters comes after it",
)


@transform
def int2_1(
    bits: int = 2, group_size: int | None = 128, rank: int = 8, damping: float = 0.01
):
    """W = Q + A B: GPTQ's integers and an adapter that corrects their error.

    A B starts as the term of rank r with the least output error, in closed form,
    where the paper starts at zero; it is an adapter: training with kind ``lora`` on
    the dense model's outputs is the paper's error correction (section 3.3).
    """
    metric = gram(damping)
    correct = trainable(low_rank(rank, metric))
    return compress(obs(Grid(Integer(bits), group_size), metric), correct=correct)
