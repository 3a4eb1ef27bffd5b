"""The one place that knows how jax versions differ (0.10 to 0.12)."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    """A device mesh whose axes the compiler shards (Auto in every version)."""
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def cost_analysis(compiled) -> dict[str, float]:
    """The compiler's own cost figures; a list of one dictionary in older versions."""
    cost = compiled.cost_analysis()
    return dict((cost[0] if isinstance(cost, list) else cost) or {})
