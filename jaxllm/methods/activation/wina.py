"""WINA: a token reads only the inputs of largest magnitude times weight norm."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.gates import top_inputs

card = Card(
    "WINA",
    paper="arXiv:2505.19427",
    claims=(
        Claim("wina(0.5)", "wina(0.5, weighted=False)"),
        Claim("wina(0.7)", "wina(0.7, weighted=False)"),
    ),
    composes="on dense weights; what it gates may be pruned or quantized afterwards",
)


@transform
def wina(sparsity: float = 0.5, weighted: bool = True):
    """y = (x * m) W with m_i = 1 for the top k of |x_i| |W_i|_2, per token (eq. 2).

    Nothing is stored less: the gain is in the rows that need not be read. The paper
    also rotates some weights to orthogonal columns and spreads the sparsity greedily
    over layers; here weights stay and every layer has the same share.
    ``weighted=False`` ranks by |x_i| alone (TEAL), the paper's baseline.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}; accepted: 0 <= sparsity < 1")
    return compress(top_inputs(1 - sparsity, weighted))
