"""AdaDim: groups within an output or within an input, whichever suits the layer."""

from jaxllm.core.allocate import assigned
from jaxllm.core.card import Card
from jaxllm.core.compose import Pipeline, compress, transform
from jaxllm.core.formats import Integer
from jaxllm.core.metrics import gram
from jaxllm.core.mixtures import AcrossOutputs
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest, obs

card = Card(
    "AdaDim",
    paper="arXiv:2309.15531",
    composes="last of the weight methods; after rescaling or rotation",
)


@transform
def adadim(
    bits: int = 4,
    group_size: int = 128,
    solver: str = "rtn",
    dimension: str = "adaptive",
    damping: float = 0.01,
):
    """Per-IC groups (outputs of one input) or per-OC groups (inputs of one output).

    Per-IC isolates a strong input's error (section 3); the layer's output error
    decides (section 4), on the dense model's inputs. ``dimension`` "input" or
    "output" fixes it.
    """
    kinds = {"input": ("input",), "output": ("output",)}
    if dimension not in ("adaptive", *kinds) or solver not in ("rtn", "gptq"):
        raise ValueError(
            f"dimension {dimension!r}, solver {solver!r}; accepted: "
            "'adaptive', 'input', 'output'; 'rtn', 'gptq'"
        )
    grid = Grid(Integer(bits), group_size)
    targets = dict(output=grid, input=AcrossOutputs(grid))
    solve = nearest if solver == "rtn" else lambda t: obs(t, gram(damping))
    chosen = [solve(targets[k]) for k in kinds.get(dimension, ("output", "input"))]
    if len(chosen) == 1:
        return compress(chosen[0])
    return assigned(tuple(Pipeline(s) for s in chosen))
