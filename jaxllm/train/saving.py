"""Resume points of a training run, through Orbax: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxllm.core.model import named_leaves
from jaxllm.train.state import State


class ResumePoints:
    """The latest states of a run, in ``folder``; a context manager.

    A point holds the leaves of the state by their paths, and a fingerprint of paths,
    shapes and data types, so that a point of another run is refused.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(
            Path(folder).expanduser().resolve(), options=options
        )

    def __enter__(self) -> ResumePoints:
        return self

    def __exit__(self, *reason) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest point."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        step = int(state.step)
        if step == self.latest:
            return
        leaves = named_leaves(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                about=ocp.args.JsonSave({"fingerprint": fingerprint(leaves)}),
            ),
        )

    def restore(self, like: State) -> State | None:
        """The newest state, placed as the leaves of ``like``; ``None`` without one.

        Raises:
          ValueError: The point belongs to another model, optimiser or selection.
        """
        step = self.latest
        if step is None:
            return None
        wanted = named_leaves(like)
        about = self._manager.restore(
            step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
        )
        if about["about"]["fingerprint"] != fingerprint(wanted):
            raise ValueError(
                f"the resume point {self._manager.directory}/{step} was written with "
                "another model, optimizer or trainable part; use another folder, or "
                "delete that one to start anew"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
        )
        leaves = [found["state"][name] for name in wanted]
        return jax.tree.structure(like).unflatten(leaves)


def fingerprint(leaves: dict[str, jax.Array]) -> str:
    """Sixteen hex digits of names, shapes and data types."""
    facts = [(name, list(x.shape), str(x.dtype)) for name, x in leaves.items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
