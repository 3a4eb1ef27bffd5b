"""ShortGPT: drop the layers that change their input's direction least."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import transform
from jaxllm.core.depth import block_influence, drop_layers, removal_loss

SCORES = {"influence": block_influence, "loss": removal_loss}

card = Card(
    "ShortGPT",
    paper="arXiv:2403.03853",
    claims=(Claim("shortgpt(1)", "llm_pruner(0.18)"),),
    composes="first: the layers that stay are untouched",
)


@transform
def shortgpt(layers: int = 1, score: str = "influence", again: bool = False):
    """Remove the ``layers`` of least BI = 1 - E[cos(x_in, x_out)] (eq. 1).

    ``score="loss"`` ranks layers by the language-model loss without them; ``again``
    ranks anew after each removal.
    """
    if score not in SCORES:
        raise ValueError(f"score {score!r}; accepted: {', '.join(SCORES)}")
    return drop_layers(SCORES[score](), layers, again=again)
