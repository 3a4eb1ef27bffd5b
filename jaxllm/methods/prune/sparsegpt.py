"""SparseGPT: the solver of GPTQ with a sparsity pattern in place of a grid."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import gram
from jaxllm.core.patterns import parse_pattern
from jaxllm.core.solvers import obs

card = Card(
    "SparseGPT",
    paper="arXiv:2301.00774",
    claims=(
        Claim("sparsegpt(0.5)", "wanda(0.5)"),
        Claim('sparsegpt("2:4")', 'wanda("2:4")'),
        Claim('sparsegpt("2:4")', 'wanda("2:4")', model="twin", margin=0.05),
        Claim("sparsegpt(0.5)", "wanda(0.5)", model="builtin"),
        Claim('sparsegpt("2:4")', 'wanda("2:4")', model="builtin"),
    ),
    composes="before quantization, which then keeps the zeros",
)


@transform
def sparsegpt(
    sparsity: float | str = 0.5, block_size: int = 128, damping: float = 0.01
):
    """Remove weights of least w_i^2 / [H^-1]_ii and let the later inputs adapt.

    The mask is chosen every ``block_size`` inputs among all outputs together
    (section 3.2), or N of every M inputs per output; errors spread as in GPTQ.
    """
    pattern = parse_pattern(sparsity, block_size, joint=True)
    return compress(obs(pattern, gram(damping)))
