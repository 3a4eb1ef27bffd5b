"""Inputs in another order, so that what is alike shares a block."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxllm.core.spec import expression
from jaxllm.core.stats import Stats
from jaxllm.core.weights import Permutation, Transformed


@expression(needs=("absmax",))
def by_range(solve):
    """Another solver on inputs sorted by falling max|x|: outliers share their blocks.

    The input is reordered at run time; its order is stored with each weight.
    """

    def run(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("reordered inputs do not keep a sparse support")
        small = np.min_scalar_type(len(w) - 1)
        order = jnp.argsort(-stats.absmax.value, stable=True).astype(small)
        op = Permutation(order)
        seen = Stats({name: stats.items[name] for name in solve.needs}).through(op)
        return Transformed(op, solve(w[order], seen, key, None))

    return run
