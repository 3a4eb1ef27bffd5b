"""Deliberate one-line faults in core, and the narrow tests that must catch each."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """``before`` becomes ``after`` in a file; ``tests`` are pytest's arguments."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, str, str]

    def apply(self, text: str) -> str:
        """The text with the fault.

        Raises:
          ValueError: ``before`` is not there exactly once (the source has changed).
        """
        if text.count(self.before) != 1:
            found = text.count(self.before)
            raise ValueError(
                f"{self.name}: {self.file} has {self.before!r} {found} times, not once"
            )
        return text.replace(self.before, self.after)


def _only(file: str, words: str) -> tuple[str, str, str]:
    return (f"tests/{file}.py", "-k", words)


FAULTS = (
    Fault(
        "sign: errors are added to later inputs instead of taken off",
        "jaxllm/core/sweep.py",
        "w = (w - later[:, None] * error[None]).at[i].set(q)",
        "w = (w + later[:, None] * error[None]).at[i].set(q)",
        _only("test_core", "obs_is_better and int3"),
    ),
    Fault(
        "transpose: the drift E[(x~ - x) xT] the other way round",
        "jaxllm/core/solvers.py",
        "p = jnp.triu(drift @ u.T, 1) @ u",
        "p = jnp.triu(drift.T @ u.T, 1) @ u",
        _only("test_quantize", "gptaq"),
    ),
    Fault(
        "inverted mask: the least important weights are kept apart",
        "jaxllm/core/splits.py",
        "jnp.argsort(-score.ravel())[:count]",
        "jnp.argsort(score.ravel())[:count]",
        _only("test_quantize", "exempt"),
    ),
    Fault(
        "stale statistic: blocks see the inputs of the uncompressed prefix",
        "jaxllm/core/walk.py",
        "            states.advance(block, get(params, path))",
        "            states.advance(block, get(model.params, path))",
        _only("test_core", "prefix"),
    ),
    Fault(
        "stale count: a second batch adds to the sum and not to the tokens",
        "jaxllm/core/stats.py",
        "return Gram(self.total + other.total, self.count + other.count)",
        "return Gram(self.total + other.total, self.count)",
        _only("test_core", "means_of"),
    ),
    Fault(
        "wrong axis: one scale for all outputs of a block",
        "jaxllm/core/scales.py",
        "peak = jnp.abs(block).max(0)\n        return jnp.maximum(peak * shrink",
        "peak = jnp.full(block.shape[1], jnp.abs(block).max())\n"
        "        return jnp.maximum(peak * shrink",
        _only("test_core", "each_output"),
    ),
    Fault(
        "damping dropped",
        "jaxllm/core/metrics.py",
        "extra = damping * diagonal.mean() + jnp.where",
        "extra = jnp.where",
        _only("test_core", "damping"),
    ),
    Fault(
        "the order of the sweep is not undone",
        "jaxllm/core/solvers.py",
        "values = jnp.zeros_like(q).at[turn].set(q)",
        "values = q",
        _only("test_core", "activation_order"),
    ),
    Fault(
        "off by one: an input takes the parameters of the next group",
        "jaxllm/core/scales.py",
        "return jnp.arange(count) // min(",
        "return (jnp.arange(count) + 1) // min(",
        _only("test_core", "each_output"),
    ),
    Fault(
        "missing zero point: rows of an embedding are read without it",
        "jaxllm/core/weights/quantized.py",
        "zero=None if zero is None else pick(zero)",
        "zero=None",
        _only("test_weights", "rows_are and int4"),
    ),
    Fault(
        "wrong factor in a fold: norms that store 1 + scale keep the 1",
        "jaxllm/core/equivalences.py",
        "wide = (scale.astype(jnp.float32) + one) * kept - one",
        "wide = scale.astype(jnp.float32) * kept",
        _only("test_equivalences", "shift_and_scale"),
    ),
    Fault(
        "wrong factor in a rotation: the 1 of such norms is not folded",
        "jaxllm/core/rotations.py",
        "rows = to_rank((scale + one)[:, None], w.ndim)",
        "rows = to_rank(scale[:, None], w.ndim)",
        _only("test_equivalences", "rotation_keeps"),
    ),
)
