"""Wanda: rank weights by |w| times the norm of their input, within each output."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import diagonal
from jaxllm.core.patterns import parse_pattern
from jaxllm.core.solvers import nearest

card = Card(
    "Wanda",
    paper="arXiv:2306.11695",
    claims=(
        Claim("wanda(0.5)", "magnitude(0.5)"),
        Claim('wanda("2:4")', 'magnitude("2:4")'),
        Claim("wanda(0.5)", "magnitude(0.5)", model="twin", margin=0.1),
    ),
    composes="before quantization, which then keeps the zeros",
)


@transform
def wanda(sparsity: float | str = 0.5):
    """S_ij = |w_ij| |x_j|_2 (eq. 1), compared among the weights of one output.

    ``sparsity`` is the share removed, or a pattern such as ``"2:4"``.
    """
    return compress(nearest(parse_pattern(sparsity), diagonal()))
