"""ZeroQuant-FP: FP4 weights, FP8 activations, and a low-rank term for the error."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import ActivationFormat, Levels, parse_format
from jaxllm.core.metrics import gram, identity
from jaxllm.core.scales import Grid, absmax, power_of_two
from jaxllm.core.solvers import obs
from jaxllm.core.splits import low_rank

card = Card(
    "ZeroQuant-FP",
    paper="arXiv:2307.09782",
    claims=(
        Claim(
            "zeroquant_fp(group_size=32, rank=0)",
            "zeroquant_fp(activations='int8', group_size=32, rank=0)",
            model="twin",
        ),
    ),
    composes="after rescaling or rotation; last of the weight methods",
)


@transform
def zeroquant_fp(
    weights: str = "e2m1",
    activations: str | None = "e4m3",
    group_size: int | None = 128,
    shifts: bool = False,
    rank: int = 8,
    damping: float = 0.01,
):
    """W4A8 in floats: GPTQ on an FP4 grid, tokens rounded to FP8, LoRC (section 3).

    ``shifts`` makes scales powers of two (constraint M1; M2 is not here), stored in a
    byte. LoRC adds the best rank-r term of W - Q, kept in bfloat16.
    """
    rule = power_of_two(absmax()) if shifts else absmax()
    kept = "float8_e8m0fnu" if shifts else "bfloat16"
    grid = Grid(parse_format(weights), group_size, rule, scale_dtype=kept)
    correct = low_rank(rank, identity()) if rank else None
    rounding = None if activations is None else _tokens(activations)
    return compress(obs(grid, gram(damping)), correct=correct, activations=rounding)


def _tokens(name: str) -> ActivationFormat:
    form = parse_format(name)
    return ActivationFormat(
        form.bits, element=form if isinstance(form, Levels) else None
    )
