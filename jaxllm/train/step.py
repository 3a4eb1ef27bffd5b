"""One training step: a jitted pure function of (state, frozen part, batch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxllm.core.batch import Batch
from jaxllm.core.model import Model, combine
from jaxllm.models import Policy
from jaxllm.train.losses import Loss
from jaxllm.train.state import Guard, State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step: mean loss (nats per target), gradient norm before clipping,
    target tokens, 1 where the update was refused, and the updates made before."""

    loss: Float[Array, ""]
    norm: Float[Array, ""]
    tokens: Float[Array, ""]
    skipped: Int[Array, ""]
    updates: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class SpikeRule:
    """When an update is refused: a loss or gradient norm that is not finite, or is
    above ``factor`` times its running average (after ``warmup`` steps).

    The averages forget with ``decay`` and take in a refused value capped at the
    threshold, so that a lasting change of level is accepted after a few steps.
    """

    loss_factor: float = 3.0
    norm_factor: float = 20.0
    decay: float = 0.98
    warmup: int = 50

    def __post_init__(self):
        if min(self.loss_factor, self.norm_factor) <= 1:
            raise ValueError(f"factors of {self} are expected to be above 1")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay is {self.decay}, expected one in (0, 1)")

    def judge(self, guard: Guard, loss, norm) -> tuple[Array, Guard]:
        """(whether the update is refused, the averages after this step)."""
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        ready = guard.seen >= self.warmup
        tops = self.loss_factor * guard.loss, self.norm_factor * guard.norm
        high = ready & ((loss > tops[0]) | (norm > tops[1]))
        refused = ~finite | high

        def average(old, new, top):
            new = jnp.where(ready, jnp.minimum(new, top), new)
            rate = jnp.maximum(1 - self.decay, 1.0 / (guard.seen + 1))
            return jnp.where(finite, old + rate * (new - old), old)

        return refused, Guard(
            loss=average(guard.loss, loss, tops[0]),
            norm=average(guard.norm, norm, tops[1]),
            seen=guard.seen + finite,
            skipped=guard.skipped + refused,
        )


USUAL = SpikeRule()


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip: float | None = 1.0,
    policy: Policy | None = None,
    spikes: SpikeRule | None = USUAL,
) -> Callable[[State, Model, Batch], tuple[State, Metrics]]:
    """The jitted step ``(state, frozen, batch) -> (state, metrics)``.

    The state is donated: do not use the one handed in again. The frozen part is not.

    Args:
      loss: ``(model, batch, key) -> (total, weight)``.
      optimizer: Of the trainable part.
      accumulate: Microbatches of a step, one after the other. Gradients are those of
        sum of totals / sum of weights, hence of the whole batch.
      clip: Largest global gradient norm, ``None`` for no clipping.
      policy: Data types of the computation instead of the model's own; parameters and
        optimiser state stay as they are (mixed precision: float32 and bfloat16).
      spikes: Which updates to refuse; ``None`` takes all.

    Raises:
      ValueError: accumulate or clip out of range; on the first call, a batch whose
        rows do not split into ``accumulate`` parts.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}, expected 1 or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, expected a positive norm, or None")

    def step(state: State, frozen: Model, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def objective(params: Model, part: Batch, key: Array):
            total, weight = loss(_computing(combine(params, frozen), policy), part, key)
            return total, weight

        total, weight, grads = _gradients(
            objective, state.params, split_rows(batch, accumulate), key
        )
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g * scale, grads)
        mean, norm = total * scale, optax.global_norm(grads)
        if clip is not None:
            shrink = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        refused, guard = jnp.zeros((), bool), state.guard
        if spikes is not None:
            refused, guard = spikes.judge(guard, mean, norm)
        updates = state.step - state.guard.skipped
        seen = Metrics(mean, norm, weight, refused.astype(jnp.int32), updates)
        return _update(state, optimizer, grads, refused, guard), seen

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    loss: Loss, policy: Policy | None = None
) -> Callable[[Model, Model, Batch], tuple[Array, Array]]:
    """The jitted ``(trainable, frozen, batch) -> (total, weight)`` of a loss."""

    @jax.jit
    def evaluate(params: Model, frozen: Model, batch: Batch):
        model = _computing(combine(params, frozen), policy)
        return loss(model, batch, jax.random.key(0))

    return evaluate


def split_rows(batch: Batch, parts: int) -> Batch:
    """A batch [rows, ...] as [parts, rows / parts, ...]."""
    rows = batch.tokens.shape[0]
    if rows % parts:
        raise ValueError(f"{rows} rows do not split into {parts} microbatches")
    fold = lambda x: x.reshape(parts, rows // parts, *x.shape[1:])  # noqa: E731
    return jax.tree.map(fold, batch)


def _gradients(objective, params: Model, parts: Batch, key: Array):
    """(total, weight, gradient of total) summed over microbatches [parts, ...]."""
    run = jax.value_and_grad(objective, has_aux=True)
    count = parts.tokens.shape[0]
    if count == 1:
        whole = jax.tree.map(lambda x: x[0], parts)
        (total, weight), grads = run(params, whole, key)
        return total, weight, grads

    def add(sums, item):
        part, index = item
        (total, weight), grads = run(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, sums, (total, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = zero, zero, jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, start, (parts, jnp.arange(count)))[0]


def _computing(model: Model, policy: Policy | None) -> Model:
    if policy is None:
        return model
    return model.replace(config=dataclasses.replace(model.config, policy=policy))


def _update(state: State, optimizer, grads, refused, guard: Guard) -> State:
    """The next state; where the update is refused only ``step`` and guard move on."""
    updates, moved = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda old, new: jnp.where(refused, old, new)  # noqa: E731
    params, moved = jax.tree.map(keep, (state.params, state.optimizer), (params, moved))
    return State(state.step + 1, params, moved, state.key, guard)
