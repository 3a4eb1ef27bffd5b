"""QuaRot: a random Hadamard rotation rids weights, activations, KV of outliers."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import cached, compress, sequence, transform
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.metrics import gram
from jaxllm.core.rotations import hadamard_rotation
from jaxllm.core.scales import Grid, mse
from jaxllm.core.solvers import nearest, obs

card = Card(
    "QuaRot",
    paper="arXiv:2404.00456",
    claims=(
        Claim(
            "quarot(solver='rtn')", "quarot(solver='rtn', rotate=False)", model="twin"
        ),
        Claim("quarot()", "quarot(rotate=False)", model="twin"),
        Claim("quarot()", "quarot(rotate=False)", model="builtin"),
    ),
    composes="first: it rotates dense weights of a model with RMS norms",
)


@transform
def quarot(
    bits: int | None = 4,
    activation_bits: int | None = 4,
    kv_bits: int | None = 4,
    group_size: int | None = None,
    solver: str = "gptq",
    rotate: bool = True,
):
    """Y = (X Q)(QT W) with Q a random-sign Hadamard matrix (section 4).

    The rotation is folded into embedding, projections and head (norm scales first);
    Hadamard transforms stay online before the output and down projections and on
    queries and keys. Weights per output (or group) by GPTQ or ``solver="rtn"``,
    activations symmetric per token with clipping 0.9, keys and values asymmetric per
    head with clipping 0.95. ``rotate=False`` is the plain baseline, a None bit width
    leaves that part alone.
    """
    if solver not in ("gptq", "rtn"):
        raise ValueError(f"solver {solver!r}; accepted: 'gptq', 'rtn'")
    steps = [hadamard_rotation()] if rotate else []
    if bits is not None:
        grid = Grid(Integer(bits, symmetric=True), group_size, mse())
        solve = obs(grid, gram()) if solver == "gptq" else nearest(grid)
        steps.append(compress(solve, activations=_activations(activation_bits)))
    elif activation_bits is not None:
        steps.append(compress(activations=_activations(activation_bits)))
    if kv_bits is not None:
        format = ActivationFormat(kv_bits, symmetric=False, clip=0.95)
        steps.append(cached(format, rotate=rotate))
    if not steps:
        raise ValueError("quarot with nothing to do: give bits or rotate=True")
    return sequence(*steps)


def _activations(bits: int | None) -> ActivationFormat | None:
    return None if bits is None else ActivationFormat(bits, clip=0.9)
