"""What a training run carries from step to step, as one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxllm.core.model import Model, partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """Running averages that say what a normal step is, and how many were not.

    Attributes:
      loss, norm: Exponential averages of loss and gradient norm.
      seen: Steps in the averages.
      skipped: Steps whose update was refused.
    """

    loss: Float[Array, ""]
    norm: Float[Array, ""]
    seen: Int[Array, ""]
    skipped: Int[Array, ""]

    @classmethod
    def empty(cls) -> Guard:
        real, whole = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return jax.tree.map(jnp.copy, cls(real, real, whole, whole))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A training run between two steps.

    Attributes:
      step: Batches consumed, skipped ones included: the data order follows it.
      params: The trainable part of a model (``None`` where a leaf is frozen).
      optimizer: State of the optimiser.
      key: Raw random key (uint32); a step uses ``fold_in(key, step)``.
      guard: Running averages of the loss-spike guard.
    """

    step: Int[Array, ""]
    params: Model
    optimizer: Any
    key: Array
    guard: Guard


def initial_state(
    trainable: Model, optimizer: optax.GradientTransformation, seed: int = 0
) -> State:
    """The state before the first step; ``trainable`` is copied, not taken over."""
    params = jax.tree.map(jnp.copy, trainable)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
        guard=Guard.empty(),
    )


def split_model(
    model: Model, trainable: Callable[[str, Any], bool] | None = None
) -> tuple[Model, Model]:
    """(trainable, frozen) parts of a model; the trainable leaves become float32.

    ``trainable(path, leaf)`` chooses among the floating-point leaves (default: all);
    packed codes and indices are never trainable.

    Raises:
      ValueError: Nothing is trainable.
    """

    def chosen(path: str, leaf) -> bool:
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return bool(real and (trainable is None or trainable(path, leaf)))

    mine, rest = partition(model, chosen)
    if not jax.tree.leaves(mine):
        raise ValueError("no parameter is trainable: nothing floating-point was chosen")
    return jax.tree.map(lambda x: x.astype(jnp.float32), mine), rest
