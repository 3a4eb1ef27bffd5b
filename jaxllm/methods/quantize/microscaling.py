"""Microscaling: small blocks of floats or integers that share a narrow scale."""

from jaxllm.core.card import Card, Claim
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Format, Levels, float_format, parse_format
from jaxllm.core.metrics import gram
from jaxllm.core.scales import Grid, absmax, microscale
from jaxllm.core.solvers import nearest, obs

card = Card(
    "Microscaling (MX, NVFP4)",
    paper="arXiv:2310.10537",
    claims=(Claim('microscaling("nvfp4")', "rtn(format='e2m1', group_size=32)"),),
    composes="last of the weight methods; after rescaling, rotation or pruning",
)
ELEMENTS = dict(
    mxfp4="e2m1", mxfp6="e3m2", mxfp6_e2m3="e2m3", mxfp8="e4m3", mxfp8_e5m2="e5m2"
)


@transform
def microscaling(format: str = "mxfp4", solver: str = "rtn", damping: float = 0.01):
    """w = 2^e v, 32 inputs to a power of two of eight bits (OCP MX 1.0).

    ``mxfp4``, ``mxfp6``, ``mxfp8``, ``mxint8``; ``nvfp4`` has 16 inputs to an FP8 scale
    and one scale per matrix above these.
    """
    if solver not in ("rtn", "gptq"):
        raise ValueError(f"solver {solver!r}; accepted: 'rtn', 'gptq'")
    target = block_format(format)
    return compress(nearest(target) if solver == "rtn" else obs(target, gram(damping)))


def block_format(name: str) -> Grid:
    """The grid of a block format by its name."""
    if name == "nvfp4":
        scale = float_format(4, 3)
        return Grid(float_format(2, 1), 16, absmax(), False, scale, None)
    if name == "mxint8":
        values = tuple(v / 64 for v in range(-127, 128))
        element: Format = Levels("mxint8", values)
    elif name in ELEMENTS:
        element = parse_format(ELEMENTS[name])
    else:
        accepted = ", ".join((*ELEMENTS, "mxint8", "nvfp4"))
        raise ValueError(f"block format {name!r}; accepted: {accepted}")
    return Grid(element, 32, microscale(), scale_dtype="float8_e8m0fnu")
