"""SpinQuant: the rotations that QuaRot draws at random are learned on the loss."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import cached, compress, sequence, transform
from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid, mse
from jaxllm.core.solvers import nearest, obs
from jaxllm.core.spin import learned_rotation

card = Card(
    "SpinQuant",
    paper="arXiv:2405.16406",
    claims=(
        Claim(
            "spinquant(solver='rtn', steps=16)",
            "quarot(solver='rtn')",
            model="twin",
            margin=0.02,
        ),
        Claim(
            "spinquant(solver='rtn', kv_bits=None, steps=16)",
            "quarot(solver='rtn', kv_bits=None)",
            model="twin",
            margin=0.02,
        ),
    ),
    composes="first: it rotates dense weights of a model with RMS norms",
)


@transform
def spinquant(
    bits: int = 4,
    activation_bits: int | None = 4,
    kv_bits: int | None = 4,
    group_size: int | None = None,
    solver: str = "gptq",
    steps: int = 100,
    rate: float = 1.5,
):
    """min over R1, R2 orthogonal of the loss of the rounded model (eq. 2).

    The residual stream and the values within heads turn by learned matrices, which
    fold; Hadamard transforms stay online in front of down and on queries and keys.
    Rotations are learned with exact weights before GPTQ, with rounded ones before
    ``solver="rtn"``. Weights per output (or group), activations symmetric per token
    with clipping 0.9, keys and values asymmetric per head with 0.95, as QuaRot has.
    """
    if solver not in ("gptq", "rtn"):
        raise ValueError(f"solver {solver!r}; accepted: 'gptq', 'rtn'")
    grid = Grid(Integer(bits, symmetric=True), group_size, mse())
    inputs = cache = None
    if activation_bits is not None:
        inputs = ActivationFormat(activation_bits, clip=0.9)
    if kv_bits is not None:
        cache = ActivationFormat(kv_bits, symmetric=False, clip=0.95)
    sweep = solver == "gptq"
    body = [
        learned_rotation(
            None if sweep else nearest(grid),
            activations=inputs,
            cache=cache,
            steps=steps,
            rate=rate,
        ),
        compress(obs(grid, gram()) if sweep else nearest(grid), activations=inputs),
    ]
    return sequence(*body, *([] if cache is None else [cached(cache, rotate=True)]))
