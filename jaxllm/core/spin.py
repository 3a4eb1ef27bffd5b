"""Rotations learned on the loss of the rounded model (SpinQuant)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import weights
from jaxllm.core.adam import Best
from jaxllm.core.arrays import straight_through
from jaxllm.core.compose import Context
from jaxllm.core.formats import ActivationFormat
from jaxllm.core.hadamard import hadamard_matrix
from jaxllm.core.learned import Straight, as_before, in_float32
from jaxllm.core.model import Model, get, layer_key, with_weight
from jaxllm.core.rotations import (
    rotate_hidden,
    rotate_residual,
    turn_heads,
    untie,
    value_sites,
)
from jaxllm.core.slopes import cross_entropy
from jaxllm.core.spec import expression, marked
from jaxllm.core.stiefel import cayley_step
from jaxllm.core.weights import ActivationQuantized, Orthogonal


@expression
def learned_rotation(
    solve=None,
    *,
    activations: ActivationFormat | None = None,
    cache: ActivationFormat | None = None,
    steps: int = 100,
    rate: float = 1.5,
):
    """The body of SpinQuant (arXiv:2405.16406, eq. 2): min L(R1, R2), both orthogonal.

    R1 turns the residual stream, one R2 per layer the values within heads; both are
    folded. A Hadamard transform stays online in front of down (R4). They start as
    random-sign Hadamard matrices and learn by Cayley SGD on the loss of the next token,
    with weights rounded by ``solve`` (None: exact, for GPTQ afterwards), inputs to
    ``activations``, keys and values to ``cache`` after a Hadamard transform of keys
    and queries (R3). Gradients pass rounding straight and ranges count as constants, as
    in the authors' code: those of ranges are mostly noise. The step falls linearly from
    ``rate``. After each pass over the calibration batches the mean loss is measured,
    and the best pass is kept, the start included. Nothing is rounded in the result.
    """
    if steps < 1 or rate <= 0:
        raise ValueError(f"steps {steps}, rate {rate}: at least 1 and above 0")
    if solve is not None and solve.needs:
        raise ValueError(f"{solve!r} needs {solve.needs}: rotations round without")
    formats = (None if f is None else Straight.of(f) for f in (activations, cache))
    spin = Spin(solve, *formats)

    def run(model: Model, context: Context) -> Model:
        model = untie(model)
        wide = model.replace(params=in_float32(model.params))
        rates = [rate * (1 - step / steps) for step in range(steps)]
        theta = _best(spin, rates, first_rotations(wide, context.key), wide, context)
        turned = rotated(wide, theta)
        return turned.replace(params=as_before(turned.params, model.params))

    return marked(run, whole=True, needs=("loss",))


@dataclasses.dataclass(frozen=True)
class Spin:
    """The static part of learning rotations: what is rounded, and how."""

    solve: Any
    activations: ActivationFormat | None
    cache: ActivationFormat | None

    def loss(self, theta, model: Model, batch):
        """Next-token loss of the turned and rounded model, with gradients."""
        turned = rotated(model, theta)
        for path in model.config.linears():
            w = get(turned.params, f"{path}.weight")
            turned = with_weight(turned, path, weights.refine(w, self._rounded, None))
        if self.cache is not None:
            turned = turned.replace(config=model.config.with_cache(self.cache, True))
        return cross_entropy(turned, batch)

    def _rounded(self, w, stats, support):
        if self.solve is not None:
            solve = lambda w: weights.materialize(self.solve(w, None))  # noqa: E731
            for _ in w.shape[:-2]:
                solve = jax.vmap(solve)
            w = straight_through(solve(w).astype(w.dtype), w)
        if self.activations is None:
            return w
        return ActivationQuantized(w, self.activations)


def first_rotations(model: Model, key: jax.Array) -> dict:
    """R1, and by the tap of the values' mixture R2: Hadamard with random signs."""

    def one(name: str, size: int):
        signs = jax.random.rademacher(layer_key(key, name), (size,), jnp.float32)
        return signs[:, None] * jnp.asarray(hadamard_matrix(size))

    values = {s.tap: one(s.tap, s.head_dim) for s in value_sites(model)}
    return dict(stream=one("stream", model.config.width), values=values)


def rotated(model: Model, theta) -> Model:
    """The same function with R1 and R2 folded and R4 in front of down."""
    model = rotate_residual(model, Orthogonal(theta["stream"]))
    for site in value_sites(model):
        model = turn_heads(model, site, Orthogonal(theta["values"][site.tap]))
    return rotate_hidden(model)


def _best(spin: Spin, rates, theta, model: Model, context: Context):
    """The rotations of the best pass; losses go to the monitor."""
    batches = list(context.calibration)

    def total(theta):
        losses = [_loss(spin, theta, model, batch) for batch in batches]
        return jnp.stack(losses).mean()

    best = Best.start(theta, total(theta))
    for step, rate in enumerate(rates):
        batch = batches[step % len(batches)]
        theta = _step(spin, theta, model, batch, jnp.asarray(rate))
        if (step + 1) % len(batches) == 0 or step + 1 == len(rates):
            best = best.or_this(theta, total(theta))
    best.note(context.monitor, "spin")
    return best.value


@functools.partial(jax.jit, static_argnums=0)
def _loss(spin: Spin, theta, model: Model, batch):
    return spin.loss(theta, model, batch)


@functools.partial(jax.jit, static_argnums=0)
def _step(spin: Spin, theta, model: Model, batch, rate):
    slopes = jax.grad(spin.loss)(theta, model, batch)
    return jax.tree.map(lambda x, g: cayley_step(x, g, rate), theta, slopes)
