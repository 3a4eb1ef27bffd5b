"""Magnitude pruning: the smallest weights go."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.patterns import parse_pattern
from jaxllm.core.solvers import nearest

card = Card(
    "Magnitude pruning",
    paper="arXiv:1506.02626",
    composes="before quantization, which then keeps the zeros",
)


@transform
def magnitude(sparsity: float | str = 0.5, scope: str = "layer"):
    """Remove the share ``sparsity`` of smallest |w|, or all but N of every M inputs.

    ``scope`` is what competes: all weights of a ``layer``, or those of one output
    (``row``); an N:M pattern has its own scope.
    """
    if scope not in ("layer", "row"):
        raise ValueError(f"scope {scope!r}; accepted: 'layer', 'row'")
    joint = scope == "layer" and not isinstance(sparsity, str)
    return compress(nearest(parse_pattern(sparsity, joint=joint)))
