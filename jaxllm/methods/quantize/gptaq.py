"""GPTAQ: GPTQ against the outputs that the dense model's own inputs would give."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import asymmetric, gram
from jaxllm.core.scales import Grid, absmax, mse
from jaxllm.core.solvers import obs

card = Card(
    "GPTAQ",
    paper="arXiv:2504.02692",
    claims=(Claim("gptaq(3, None)", "gptq(bits=3, group_size=None)"),),
    composes="after pruning it keeps the zeros; after rescaling or rotation",
)


@transform
def gptaq(
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    clip: bool = False,
    share: float = 0.25,
    correct=None,
):
    """min |Q x - W x~|^2, x the inputs behind the compressed prefix, x~ the dense ones.

    Each input i also sends w_i P_ij to later inputs, P = triu(D UT, 1) U with
    D = ``share`` E[(x~ - x) xT] (section 4; a quarter, as in the authors' code). The
    streams part block by block, in the paper layer by layer. The range of a group is
    fitted with the drift of its own inputs already mended.
    """
    grid = Grid(Integer(bits, symmetric), group_size, mse() if clip else absmax())
    order = "activation" if act_order else "given"
    return compress(obs(grid, asymmetric(gram(damping), share), order), correct=correct)
