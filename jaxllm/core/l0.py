"""L0 masks: hard-concrete gates on heads and channels, learned under a budget."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.adam import adam_state, adam_updates
from jaxllm.core.arrays import traced
from jaxllm.core.compose import Context
from jaxllm.core.model import Model, Params, Units, get, layer_key, put, weight
from jaxllm.core.slopes import cross_entropy
from jaxllm.core.spec import expression, marked
from jaxllm.core.splits import adapter_factors
from jaxllm.core.units import cut_and_mend, look, same_share, weakest_of_model

LOW, HIGH, HEAT = -0.1, 1.1, 2 / 3  # the stretch and temperature of the paper
OPEN = 2.5  # log alpha at the start: the gate at test time is one


def gate(log_alpha: Array, noise: Array | None = None) -> Array:
    """A gate in [0, 1] that may be exactly 0 or 1, with gradients in between.

    z = clip(s (HIGH - LOW) + LOW, 0, 1), s = sigmoid((log u - log(1 - u) + log alpha)
    / HEAT) with uniform ``noise`` u; without it s = sigmoid(log alpha), the value at
    test time (Louizos et al., arXiv:1712.01312, eq. 10 to 13).
    """
    if noise is None:
        s = jax.nn.sigmoid(log_alpha)
    else:
        s = jax.nn.sigmoid((jnp.log(noise) - jnp.log1p(-noise) + log_alpha) / HEAT)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0.0, 1.0)


def open_chance(log_alpha: Array) -> Array:
    """P(z > 0) = sigmoid(log alpha - HEAT log(-LOW / HIGH)) (eq. 12)."""
    return jax.nn.sigmoid(log_alpha - HEAT * jnp.log(-LOW / HIGH))


class _Plan(NamedTuple):
    """The static part: units with the weights per unit, and the rates of learning."""

    parts: tuple[tuple[Units, int], ...]
    rate: float
    adapter_rate: float


@expression
def learned_units(
    sparsity: float,
    *,
    steps: int = 100,
    rank: int = 8,
    rate: float = 0.1,
    adapter_rate: float = 1e-3,
):
    """The body that learns which heads and channels go, together with adapters.

    min E_z[L(W + A B, z)] + l1 (t - s) + l2 (t - s)^2 over gates z and adapters A B
    while l1, l2 rise: s is the expected share of the weights that go, t the goal,
    which grows to ``sparsity`` over the first half of the ``steps`` (one calibration
    batch each). Then the units of least log alpha go until that share is gone, what
    stays keeps its gate and adapters folded in, and the result is dense and smaller.
    Nothing is learned for a sparsity of zero, or where only shapes are known.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}; accepted: 0 <= sparsity < 1")
    if steps < 1 or rank < 0 or rate <= 0 or adapter_rate < 0:
        raise ValueError(
            f"steps {steps}, rank {rank}, rate {rate}, adapter_rate {adapter_rate}; "
            "accepted: at least 1, at least 0, above 0, at least 0"
        )

    def run(model: Model, context: Context) -> Model:
        parts = look(model, context, set())
        if sparsity == 0:
            return model
        if traced(model.params):
            kept = same_share(
                parts, [jnp.zeros(p.units.count) for p in parts], sparsity
            )
            return cut_and_mend(model, parts, kept)
        sizes = tuple((p.units, p.size()) for p in parts)
        plan = _Plan(sizes, rate, adapter_rate)
        theta = _learned(plan, model, context, (sparsity, steps, rank))
        scores = [theta["gates"][p.units.path] for p in parts]
        kept = weakest_of_model(parts, scores, sparsity)
        gates = {path: gate(a) for path, a in theta["gates"].items()}
        params = _gated(plan, model.params, gates, theta["adapters"])
        return cut_and_mend(model.replace(params=params), parts, kept)

    return marked(run, needs=("loss",))


def _learned(plan: _Plan, model: Model, context: Context, budget) -> dict[str, Any]:
    sparsity, steps, rank = budget
    gates = {u.path: jnp.full(u.count, OPEN, jnp.float32) for u, _ in plan.parts}
    paths = [p for u, _ in plan.parts for p in (*u.outputs, u.input)] if rank else []
    adapters = {
        p: adapter_factors(
            layer_key(context.key, p), weight(model, p).shape, rank, jnp.float32
        )
        for p in paths
    }
    theta = {"gates": gates, "adapters": adapters}
    multipliers = jnp.zeros(2)
    state = adam_state((theta, multipliers))
    batches = tuple(context.calibration)
    for i in range(steps):
        goal = sparsity * min(1.0, 2 * (i + 1) / steps)
        batch, key = batches[i % len(batches)], jax.random.fold_in(context.key, i)
        theta, multipliers, state = _step(
            plan, model, theta, multipliers, state, batch, key, jnp.float32(goal)
        )
    return theta


def _gated(plan: _Plan, params: Params, gates, adapters) -> Params:
    """Weights with their adapters added, and rows that read a unit times its gate."""
    for path, (first, second) in adapters.items():
        w = get(params, f"{path}.weight")
        params = put(params, f"{path}.weight", w + (first @ second).astype(w.dtype))
    for units, _ in plan.parts:
        path = f"{units.input}.weight"
        w = get(params, path)
        rows = jnp.repeat(gates[units.path], w.shape[-2] // units.count)
        rows = jnp.expand_dims(rows[:, None], tuple(range(w.ndim - 2)))
        params = put(params, path, w * rows.astype(w.dtype))
    return params


def removed_share(plan_parts, gates) -> Float[Array, ""]:
    """The expected share of the units' weights that go."""
    total = sum(size * units.count for units, size in plan_parts)
    gone = [
        size * (1 - open_chance(gates[units.path])).sum() for units, size in plan_parts
    ]
    return sum(gone[1:], gone[0]) / total


@functools.partial(jax.jit, static_argnums=0)
def _step(plan: _Plan, model: Model, theta, multipliers, state, batch, key, goal):
    """One step down in theta and up in the multipliers."""

    def loss(both):
        theta, (first, second) = both
        noise = {
            path: jax.random.uniform(layer_key(key, path), a.shape, minval=1e-6)
            for path, a in theta["gates"].items()
        }
        gates = {path: gate(a, noise[path]) for path, a in theta["gates"].items()}
        params = _gated(plan, model.params, gates, theta["adapters"])
        short = goal - removed_share(plan.parts, theta["gates"])
        fit = cross_entropy(model.replace(params=params), batch)
        return fit + first * short + second * short**2

    slope = jax.grad(loss)((theta, multipliers))
    (down, up), state = adam_updates(slope, state)
    rates = {"gates": plan.rate, "adapters": plan.adapter_rate}
    moved = {
        name: jax.tree.map(lambda x, d, r=rate: x - r * d, theta[name], down[name])
        for name, rate in rates.items()
    }
    return moved, multipliers + plan.rate * up, state
