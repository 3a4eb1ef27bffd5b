"""FineQuant: groups are halved as long as that narrows the ranges of a weight."""

import jax
import jax.numpy as jnp

from jaxllm.core.arrays import traced
from jaxllm.core.card import Card
from jaxllm.core.compose import Context, Pipeline, compress_each, transform
from jaxllm.core.formats import Integer
from jaxllm.core.model import Model, get
from jaxllm.core.scales import Grid
from jaxllm.core.solvers import nearest
from jaxllm.core.spec import marked
from jaxllm.core.weights import materialize

card = Card(
    "FineQuant",
    paper="arXiv:2308.09723",
    composes="last of the weight methods; needs no calibration",
)


@transform
def finequant(bits: int = 4, smallest: int = 32, alpha: float = 0.9):
    """Start with one group per output and halve it while mean ranges fall below
    ``alpha`` times the former, down to ``smallest`` inputs (section 3.2).

    Only weights are read, each matrix decides for itself. Where only shapes are known
    (``plan``), the smallest groups are taken.
    """
    if not 0 < alpha <= 1 or smallest < 1:
        raise ValueError(f"alpha {alpha}, smallest {smallest}: in 0..1, at least 1")

    def run(model: Model, context: Context) -> Model:
        each = {}
        for path in context.paths(model):
            w = materialize(get(model.params, f"{path}.weight"))
            size = group_size(w, smallest, alpha)
            each[path] = Pipeline(nearest(Grid(Integer(bits), size)))
        return compress_each(model, context, each)

    return marked(run, adaptive=True)


def group_size(w, smallest: int, alpha: float) -> int:
    """The group of inputs at which halving stops to pay."""
    size, now = w.shape[-2], _mean_range(w, w.shape[-2])
    while size // 2 >= smallest:
        half = _mean_range(w, size // 2)
        if not traced(w) and half > alpha * now:
            break
        size, now = size // 2, half
    return size


def _mean_range(w, size: int):
    """Mean over groups and outputs of max - min, zero included."""
    owner = jnp.arange(w.shape[-2]) // size
    count = -(-w.shape[-2] // size)
    rows = jnp.moveaxis(w, -2, 0)
    high = jnp.maximum(jax.ops.segment_max(rows, owner, count), 0)
    low = jnp.maximum(jax.ops.segment_max(-rows, owner, count), 0)
    return (high + low).mean()
