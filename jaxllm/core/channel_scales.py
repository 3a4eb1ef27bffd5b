"""Rescalings that touch only the channels whose activations stand out.

They are called as ``equivalence(weights, stats, site) -> factor`` [in], as those of
``equivalences`` are.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.core.equivalences import SMALL, pooled
from jaxllm.core.spec import expression


@expression(needs=("absmax",))
def capped(share: float = 0.005):
    """s = max(max|x_j| / t, 1): channels beyond the percentile t are brought to t.

    DGQ's percentile clipping smoothing (arXiv:2310.04836, section 3.3): t is the range
    of the channel that stands at ``share`` from the top, so that all other channels
    and their weights stay as they are.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share {share}; accepted: 0 to below 1")

    def equivalence(ws, stats, site):
        peak = jnp.maximum(pooled(site, stats.absmax.value), SMALL)
        rank = min(int(len(peak) * share + 1.5), len(peak))
        return 1 / jnp.maximum(peak / jnp.sort(peak)[-rank], 1.0)

    return equivalence
