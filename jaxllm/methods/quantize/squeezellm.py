"""SqueezeLLM: k-means per output, weighted by Fisher information; outliers apart."""

from jaxllm.core.card import Card
from jaxllm.core.codebooks import Centroids
from jaxllm.core.compose import compress, transform
from jaxllm.core.exempt import exempting
from jaxllm.core.metrics import fisher, identity
from jaxllm.core.solvers import nearest
from jaxllm.core.splits import outliers as largest

card = Card(
    "SqueezeLLM",
    paper="arXiv:2306.07629",
    composes="last of the weight methods, on dense weights: it needs their gradients",
)


@transform
def squeezellm(
    bits: int = 4, outliers: float = 0.0045, steps: int = 30, weighted: bool = True
):
    """min sum F_i (w_i - c(w_i))^2 over 2^bits centroids c per output (eq. 4).

    F is the squared gradient of the loss. A share ``outliers`` of largest |w| is kept
    sparse (section 4.3); the paper's 0.05 % of most sensitive weights beside them is
    left to the weighted centroids. ``weighted=False`` is plain k-means, for comparison.
    """
    target = Centroids(bits, None, steps)
    metric = fisher() if weighted else identity()
    if not outliers:
        return compress(nearest(target, metric))
    split = largest(outliers, identity())
    return compress(exempting(target, split, metric, compensate=False))
