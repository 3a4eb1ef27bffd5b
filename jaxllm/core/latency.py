"""What a number of units costs: measured time of the part, or its weights.

A cost is called as ``cost(model, part, counts)`` and gives one number for each count
of units that the part might keep.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from jaxllm.core.model import Model, get
from jaxllm.core.slicing import cut_units
from jaxllm.core.spec import expression
from jaxllm.core.units import Part

Cost = list[float]


@expression
def weight_count():
    """Weight entries of the part: the same on every machine."""
    return lambda model, part, counts: [float(n * part.size()) for n in counts]


@expression
def measured_time(batch: int = 1, length: int = 128, repeats: int = 5):
    """Seconds of the part's block on this device, less those with one unit only.

    The least of ``repeats`` runs on ``batch`` x ``length`` tokens after one to warm
    up. Blocks of equal shapes are measured once.
    """
    if min(batch, length, repeats) < 1:
        raise ValueError(f"{batch}, {length}, {repeats}; accepted: at least 1 each")
    known: dict = {}

    def cost(model: Model, part: Part, counts) -> Cost:
        seconds = [time_of(model, part, n) for n in counts]
        least = time_of(model, part, 1)
        return [max(s - least, 0.0) for s in seconds]

    def time_of(model: Model, part: Part, count: int) -> float:
        made = cut_units(model, {part.units.path: jnp.arange(count)})
        path, block = next(b for b in made.config.blocks() if _holds(b[0], part))
        params = get(made.params, path)
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(params))
        if (block, shapes) not in known:
            known[block, shapes] = _seconds(block, params, batch, length, repeats)
        return known[block, shapes]

    return cost


def _holds(path: str, part: Part) -> bool:
    return part.units.path.startswith(path + ".")


def _seconds(block, params, batch: int, length: int, repeats: int) -> float:
    run = jax.jit(lambda p, x, at: block.run(p, x, at, None, None)[0])
    hidden = jnp.ones((batch, length, block.width), block.param_dtype)
    steps = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.broadcast_to(steps, (batch, length))
    run(params, hidden, positions).block_until_ready()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(params, hidden, positions).block_until_ready()
        found.append(time.perf_counter() - start)
    return min(found)
