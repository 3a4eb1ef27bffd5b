"""EvoPress: evolution finds the level of each weight, and the layers to leave out."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import Pipeline, sequence, transform
from jaxllm.core.evolution import Evolution, evolve_depth, evolve_levels
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import obs

card = Card(
    "EvoPress",
    paper="arXiv:2410.14649",
    claims=(
        Claim(
            "evopress(None, drop=2, generations=5, offspring=6, survivors=(3, 1), "
            "batches=(1, 2))",
            "shortgpt(2)",
            margin=0.1,
        ),
    ),
    composes="first, on the dense model: it applies the methods it chooses from",
)


@transform
def evopress(
    bits: float | None = 3.5,
    options=None,
    group_size: int | None = 128,
    drop: int = 0,
    generations: int = 40,
    offspring: int = 16,
    survivors=(4, 1),
    batches=(1, 4),
):
    """min KL(dense || levels) subject to the measured bytes (algorithm 1).

    Each weight gets one of ``options``, per-layer methods such as ``sparsegpt(0.5)``
    (None: GPTQ of 2, 3 and 4 bits in groups of ``group_size``), within ``bits`` stored
    per weight; before that ``drop`` whole layers are left out (``bits=None``: nothing
    else). Mutants switch levels between units; selections on more and more data keep
    ever fewer of them. The paper drops attention and MLP separately, and trades
    levels between weights of equal size only.
    """
    plan = Evolution(generations, offspring, tuple(survivors), tuple(batches))
    if bits is None and not drop:
        raise ValueError("evopress with nothing to do: give bits or drop")
    steps = [evolve_depth(drop, plan)] if drop else []
    if bits is not None:
        grids = (Grid(Integer(b), group_size) for b in (2, 3, 4))
        default = tuple(Pipeline(obs(grid, gram())) for grid in grids)
        steps.append(evolve_levels(options or default, bits, plan))
    return sequence(*steps)
