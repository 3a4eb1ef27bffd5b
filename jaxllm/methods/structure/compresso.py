"""Compresso: L0 masks on heads and channels, learned together with LoRA."""

from jaxllm.core.card import Card
from jaxllm.core.compose import transform
from jaxllm.core.l0 import learned_units

card = Card(
    "Compresso",
    paper="arXiv:2310.05015",
    composes="first: it cuts dense weights; the result is dense for what follows",
)


@transform
def compresso(
    sparsity: float = 0.2,
    steps: int = 100,
    rank: int = 8,
    rate: float = 0.1,
    adapter_rate: float = 1e-3,
):
    """min L(W + A B, z) + l1 (t - s(z)) + l2 (t - s(z))^2 over masks and LoRA (eq. 6).

    The masks z are hard-concrete gates on heads and feed-forward channels whose
    expected share s of removed weights is driven to ``sparsity`` (section 3.2); heads
    go with their key-value head. Learned on the calibration text with the language
    model's loss, where the paper tunes on instructions. Its masks on channels of the
    residual stream and its collaborative prompt (section 3.3) are not here.
    ``rank=0`` learns masks alone.
    """
    return learned_units(
        sparsity, steps=steps, rank=rank, rate=rate, adapter_rate=adapter_rate
    )
