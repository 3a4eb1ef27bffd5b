"""PEQA: of a rounded model the scales are trained, and its codes stay."""

from jaxllm.core.card import Card
from jaxllm.core.compose import compress, transform
from jaxllm.core.formats import Integer
from jaxllm.core.scales import Grid, mse
from jaxllm.core.solvers import nearest
from jaxllm.core.splits import trained_only

card = Card(
    "PEQA",
    paper="arXiv:2305.14152",
    composes="last of the weight methods; training comes after it",
)


@transform
def peqa(bits: int = 4, group_size: int | None = None):
    """W = (s + ds) (q - z), of which ds is trained (equations 1 and 2).

    Scale and zero start where the squared error of rounding is least, one per
    ``group_size`` inputs (None: per output). ``train`` with kind ``lora`` changes the
    scales only; they are float32, where the paper's are half as wide.
    ``merge_adapters()`` leaves the packed weight.
    """
    grid = Grid(Integer(bits), group_size, mse(), scale_dtype="float32")
    return compress(trained_only(nearest(grid), "scale"))
