"""Gates: which inputs of a linear map each token reads."""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.core.spec import expression
from jaxllm.core.weights import Gated


@expression
def top_inputs(density: float = 0.5, weighted: bool = True, dtype: str = "bfloat16"):
    """Each token reads the share ``density`` of inputs with the largest |x_i| g_i.

    ``weighted`` takes g_i = |W_i|_2, the norm of the input's weights (WINA,
    arXiv:2505.19427, eq. 2), else g_i = 1 (TEAL, arXiv:2408.14690, with a count in
    place of a threshold). Both store g, so that they have the same size.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density}; accepted: 0 < density <= 1")

    def solve(w, stats, key=None, support=None):
        dense = w.astype(jnp.float32)
        norms = jnp.sqrt((dense**2).sum(-1))
        gain = norms if weighted else jnp.ones_like(norms)
        kept = max(1, int(density * len(w) + 0.5))
        return Gated(w, gain.astype(dtype), kept)

    return solve
