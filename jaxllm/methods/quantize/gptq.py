"""GPTQ: round input by input; the inverse Hessian spreads each error over the rest."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid, absmax, mse
from jaxllm.core.solvers import obs

card = Card(
    "GPTQ",
    paper="arXiv:2210.17323",
    claims=(
        Claim("gptq(bits=3, group_size=32)", "rtn(bits=3, group_size=32)"),
        Claim("gptq(bits=4, group_size=32)", "rtn(bits=4, group_size=32)"),
        Claim("gptq(bits=3, group_size=None)", "rtn(bits=3, group_size=None)"),
        Claim(
            "gptq(bits=3, group_size=32)", "rtn(bits=3, group_size=32)", model="twin"
        ),
        Claim(
            "gptq(bits=3, group_size=None)",
            "rtn(bits=3, group_size=None)",
            model="builtin",
        ),
        Claim("gptq(bits=3)", "rtn(bits=3)", model="builtin"),
    ),
    composes="after pruning it keeps the zeros; after rescaling or rotation",
)


@transform
def gptq(
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    clip: bool = False,
    correct=None,
):
    """Minimise tr((W - Q)T H (W - Q)), H = E[x xT] + damping mean(diag) I.

    Inputs are rounded in turn; later ones absorb the error through the Cholesky
    factor of H^-1 (section 3.3). ``act_order`` takes inputs by falling H_ii with the
    group scales fixed beforehand (the authors' later option, static groups).
    """
    grid = Grid(Integer(bits, symmetric), group_size, mse() if clip else absmax())
    order = "activation" if act_order else "given"
    return compress(obs(grid, gram(damping), order), correct=correct)
