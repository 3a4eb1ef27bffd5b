"""Width: a narrower residual stream, by its principal axes or by its channels."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.compose import Context
from jaxllm.core.model import Model
from jaxllm.core.rotations import fold_norms, rotate_residual, untie
from jaxllm.core.slicing import cut_width
from jaxllm.core.spec import expression, marked
from jaxllm.core.units import observe, strongest
from jaxllm.core.weights import Orthogonal


def resolve_width(width: int, sparsity: float, multiple: int) -> int:
    """Channels that stay, rounded down to a multiple (at least one multiple)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}; accepted: 0 <= sparsity < 1")
    if not 1 <= multiple <= width:
        raise ValueError(f"multiple {multiple}; accepted: 1 to the width, {width}")
    return max(int(width * (1 - sparsity) + 1e-6) // multiple * multiple, multiple)


@expression(needs=("gram",))
def principal_slice(sparsity: float, multiple: int = 1):
    """The body that turns the stream to its principal axes and keeps the first.

    With norms made pure, C = the sum of E[x xT] over the inputs of all norms' readers
    is that of normalised hidden states; Q are its eigenvectors by falling eigenvalue.
    """

    def run(model: Model, context: Context) -> Model:
        keep = resolve_width(model.config.width, sparsity, multiple)
        model = fold_norms(untie(model))
        axes = _principal_axes(model, context)
        return cut_width(rotate_residual(model, Orthogonal(axes)), jnp.arange(keep))

    return marked(run, whole=True)


def _principal_axes(model: Model, context: Context) -> Float[Array, "width width"]:
    taps = {s.tap for s in model.config.sites() if s.kind != "linear"}
    stats = observe(model, context, ("gram",))
    found = [stats[tap].gram.mean for tap in sorted(taps & stats.keys())]
    total = sum(_over_experts(gram, 2) for gram in found)
    return jnp.linalg.eigh(total)[1][:, ::-1]


def _over_experts(values, rank: int):
    """Per norm, also where its readers are experts that saw a part each."""
    return values.reshape(-1, *values.shape[-rank:]).mean(0)


@expression(needs=("moments",))
def active_channels(sparsity: float, multiple: int = 1):
    """The body that keeps the stream's channels of largest activity.

    A channel's activity is the sum, over all norms, of E|x_i| of their outputs
    (Minitron, arXiv:2407.14679, eq. 2).
    """

    def run(model: Model, context: Context) -> Model:
        keep = resolve_width(model.config.width, sparsity, multiple)
        taps = {s.tap for s in model.config.sites() if s.kind != "linear"}
        stats = observe(model, context, ("moments",))
        found = [stats[tap].moments for tap in sorted(taps & stats.keys())]
        score = sum(_over_experts(m.mean_absolute, 1) for m in found)
        return cut_width(model, strongest(score, keep))

    return marked(run, whole=True)
