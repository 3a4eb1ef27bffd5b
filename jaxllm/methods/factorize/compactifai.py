"""CompactifAI: weights as matrix product operators of a limited bond."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.tensors import tensor_train

card = Card(
    "CompactifAI",
    paper="arXiv:2401.14109",
    composes="on dense weights; where() picks the layers, as its profile would",
)


@transform
def compactifai(ratio: float = 0.8, sites: int = 2):
    """W = chain of ``sites`` tensors with bond chi, by successive SVDs (section II).

    The bond is the largest that takes the share ``ratio`` of the parameters. The
    paper leaves out sensitive layers and retrains briefly afterwards.
    """
    return compress(tensor_train(ratio, sites))
