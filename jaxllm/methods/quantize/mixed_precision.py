"""Mixed precision: bits per layer by sensitivity, as an integer program."""

from jaxllm.core.allocate import assigned
from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import Pipeline, transform
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid
from jaxllm.core.sensitivity import sensitivity as named
from jaxllm.core.solvers import obs

card = Card(
    "Mixed precision (HAWQ)",
    paper="arXiv:2011.10680",
    claims=(
        Claim("mixed_precision(3.77, group_size=32)", "gptq(bits=3, group_size=32)"),
    ),
    composes="after rescaling or rotation that folds; not after pruning",
)


@transform
def mixed_precision(
    bits: float = 3.5,
    widths=(2, 3, 4),
    group_size: int | None = 128,
    sensitivity: str = "fisher",
    solver: str = "milp",
    damping: float = 0.01,
):
    """min sum_i Omega_i(b_i) with at most ``bits`` stored bits per weight (eq. 6).

    Each layer gets GPTQ of one of the ``widths``; SciPy's integer program chooses, or
    ``solver="greedy"``. Omega is what the layer's rounding costs: ``trace`` of the
    Hessian times |W - Q|^2 (HAWQ-V2 and V3), ``fisher`` sum F (w - q)^2, ``gram`` the
    error of the layer's outputs, ``loss`` the measured loss with that layer rounded.
    The budget counts bytes as stored, scales included; the papers count code bits
    or a latency table. No training afterwards, and activations keep their precision.
    """
    grids = (Grid(Integer(b), group_size) for b in widths)
    options = tuple(Pipeline(obs(grid, gram(damping))) for grid in grids)
    return assigned(options, bits, solver, named(sensitivity))
