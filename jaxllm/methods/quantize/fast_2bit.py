"""Fast 2-bit: few sensitive groups of a weight in four bits, all others in two."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.metrics import diagonal, gram
from jaxllm.core.mixtures import ranked_blocks, spread
from jaxllm.core.scales import absmax

card = Card(
    "Fast 2-bit",
    paper="arXiv:2311.16442",
    claims=(
        Claim("fast_2bit(32, 0.5, 0.0)", "gptq(bits=2, group_size=14)", margin=0.1),
    ),
    composes="after rescaling or rotation; not after pruning",
)


@transform
def fast_2bit(
    group_size: int = 32,
    share: float = 0.25,
    outliers: float = 0.005,
    high: int = 4,
    damping: float = 0.01,
):
    """The ``share`` of groups of largest E[x^2] (max w - min w)^2 gets ``high`` bits.

    The groups are blocks of inputs, ranked over all outputs, so that each width is one
    dense matrix of whole bytes: the paper's memory alignment. A share ``outliers`` of
    the weights, of the two-bit groups only, stays in bfloat16. Rounded by GPTQ's sweep.
    The paper also rounds the scales again; its asynchronous GPU kernel is not here.
    """
    kinds = ((high, share), (2, 1 - share))
    solve = ranked_blocks(
        kinds, group_size, absmax(), gram(damping), diagonal(), spread(), outliers
    )
    return compress(solve)
