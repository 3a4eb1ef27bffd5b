"""ZipLM: structured optimal brain surgeon to a speed-up on a latency table."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.latency import measured_time, weight_count
from jaxllm.core.removal import prune_to_budget

card = Card(
    "ZipLM",
    paper="arXiv:2302.04089",
    claims=(
        Claim("ziplm(1.3333, cost='weights')", "wanda_sp(0.25)", margin=0.05),
        Claim("ziplm(1.3333, cost='weights')", "flap(0.25, scope='part')"),
    ),
    composes="first: it cuts dense weights; distillation or lora may recover more",
)


@transform
def ziplm(
    speedup: float = 1.33,
    cost: str = "time",
    batch: int = 1,
    length: int = 128,
    levels: int = 10,
    damping: float = 0.01,
):
    """Remove heads and channels of least tr(W_ST (G_SS)^-1 W_S), G = H^-1 (eq. 3).

    How many of each part goes is a knapsack over relative layer errors and a table of
    times measured on this device at ``batch`` x ``length`` tokens (section 3.2; the
    paper refines the choice by a random search on the loss). ``cost="weights"`` counts
    parameters instead, which repeats everywhere. One-shot, without distillation; the
    whole network is calibrated dense.
    """
    if cost not in ("time", "weights"):
        raise ValueError(f"cost {cost!r}; accepted: 'time', 'weights'")
    table = measured_time(batch, length) if cost == "time" else weight_count()
    return prune_to_budget(speedup, table, levels=levels, damping=damping)
