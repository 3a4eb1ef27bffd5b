"""Minitron: smaller width, heads, hidden layers and depth by mean activations."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import sequence, transform
from jaxllm.core.depth import drop_layers, removal_loss
from jaxllm.core.units import activity, prune_units
from jaxllm.core.width import active_channels

card = Card(
    "Minitron",
    paper="arXiv:2407.14679",
    claims=(Claim("minitron()", 'wanda_sp(0.2, score="magnitude")'),),
    composes="first, on dense weights; distillation after it is the paper's retraining",
)


@transform
def minitron(
    width: float = 0.0,
    hidden: float = 0.2,
    heads: float = 0.2,
    layers: int = 0,
    multiple: int = 8,
):
    """Cut each axis by its own share, by F = E|activation| (section 2.2).

    Channels of the stream by the outputs of all norms, hidden channels by the input
    of down, heads (with their key-value head) by the input of o, layers by the loss
    without each. Activity is the mean over all tokens where the paper takes the norm
    over the batch of means over positions; a head's is the sum of E|x| over its
    channels where the paper has the norm of its output. Equal shares in all layers, so
    that the result exports as its family.
    """
    steps = [drop_layers(removal_loss(), layers)] if layers else []
    for share, kind in ((heads, "heads"), (hidden, "channels")):
        if share:
            steps.append(prune_units(activity(), share, only=kind))
    if width:
        steps.append(active_channels(width, multiple))
    if not steps:
        raise ValueError("minitron with nothing to cut: give a share or layers")
    return sequence(*steps)
