"""QuIP#: weights made incoherent by Hadamard matrices, rounded to the E8 lattice."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.incoherence import incoherent, lattice
from jaxllm.core.metrics import gram

card = Card(
    "QuIP#",
    paper="arXiv:2402.04396",
    claims=(Claim("quip_sharp(2)", "gptq(bits=2, group_size=None)", margin=0.2),),
    composes="after rescaling; not after pruning or another rotation",
)


@transform
def quip_sharp(
    bits: int = 2,
    spread: float | None = None,
    damping: float = 0.01,
    rotate: bool = True,
):
    """min tr((W - Q)T H (W - Q)), Q = U^T (points of E8) V (sections 3 and 4).

    U and V are random-sign Hadamard matrices, online on both sides of each product;
    block LDLQ rounds eight inputs at once to E8P, whose 2^16 points are computed from
    256 patterns. ``bits`` 3 and 4 round the residual again (section 4.3). The paper's
    fine-tuning of signs and norms over several layers (section 5) is not here, nor the
    ten passes of block coordinate descent that the authors' code makes after LDLQ.
    ``rotate=False`` leaves the Hadamard matrices out, for comparison.
    """
    solve = lattice(bits, gram(damping), spread)
    return compress(incoherent(solve) if rotate else solve)
