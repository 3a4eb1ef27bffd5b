"""DSnoT: prune and grow on a pruned mask, until each output's mean error vanishes."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import diagonal, identity
from jaxllm.core.patterns import parse_pattern
from jaxllm.core.regrow import THRESHOLD, regrow

card = Card(
    "DSnoT",
    paper="arXiv:2310.08915",
    claims=(
        Claim("dsnot(0.7)", "wanda(0.7)"),
        Claim("dsnot(0.8)", "wanda(0.8)", margin=0.1),
        Claim('dsnot("2:4", threshold=0.1)', 'wanda("2:4")'),
        Claim('dsnot(0.6, start="magnitude")', 'magnitude(0.6, scope="row")'),
    ),
    composes="before quantization, which then keeps the zeros",
)


@transform
def dsnot(
    sparsity: float | str = 0.6,
    start: str = "wanda",
    cycles: int = 50,
    threshold: float = THRESHOLD,
    power: float = 1.0,
):
    """Grow argmax sign(e) w_i E[x_i] / Var(x_i), prune the least |w_j| |x_j| (eq. 4-6).

    e is the expected error of an output; see ``regrow``. ``start`` is the rule of the
    first mask, ``wanda`` or ``magnitude``, within each output. Values never change.
    """
    if start not in ("wanda", "magnitude"):
        raise ValueError(f"start {start!r}; accepted: 'wanda', 'magnitude'")
    metric = diagonal() if start == "wanda" else identity()
    pattern = parse_pattern(sparsity)
    return compress(regrow(pattern, metric, cycles, threshold, power))
