"""Products with few entries: what the kernels do beyond the named cases."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, hopper
from pallas_kernels.scattered_matmul import gpu, segments, tpu_dense, tpu_rows

CAREFUL = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SHAPE, COUNT = (500, 400), 12_000


class Uneven(NamedTuple):
    """Stripes of many, no and few entries, with unused groups behind them."""

    x: jax.Array
    dense: jax.Array
    listed: segments.Segments

    @classmethod
    def of(cls, rows: int, dtype: str) -> Uneven:
        keys = jax.random.split(jax.random.key(6), 3)
        dense = jax.random.normal(keys[0], SHAPE, dtype)
        often = jnp.zeros(400).at[:128].set(0.15).at[256:].set(0.01)
        chosen = jax.random.uniform(keys[1], SHAPE) < often
        listed = segments.pack(dense, chosen, COUNT)
        x = jax.random.normal(keys[2], (rows, 500), dtype)
        return cls(x, jnp.where(chosen, dense, 0), listed)

    def check(self, got: jax.Array) -> None:
        """``got`` is x times the matrix, and nothing where that has no entries."""
        x, kept = (a.astype(jnp.float32) for a in (self.x, self.dense))
        want = jnp.dot(x, kept, precision="highest")
        tolerance = 1e-5 if self.x.dtype == jnp.float32 else 1e-2
        assert not got[:, 128:256].any()
        assert jnp.linalg.norm(got - want) <= tolerance * jnp.linalg.norm(want)


@pytest.mark.parametrize(("rows", "dtype"), [(2, "bfloat16"), (17, "float32")])
def test_tpu_sums_over_steps_and_batches(rows, dtype):
    """The last batch goes past the last group."""
    made = Uneven.of(rows, dtype)
    tuning = tpu_rows.Tuning(groups=8, batch=8)
    with pltpu.force_tpu_interpret_mode(CAREFUL):
        got = tpu_rows.multiply(made.x, made.listed, outputs=400, tuning=tuning)
        expanded = tpu_dense.unpack(made.listed, SHAPE)
    np.testing.assert_array_equal(expanded, made.dense)
    made.check(got)


@pytest.mark.skipif(compat.VERSION < (0, 11), reason="jax 0.10 has no interpreter")
@pytest.mark.parametrize(
    ("rows", "dtype", "processors"), [(2, "bfloat16", 1), (9, "float32", 132)]
)
def test_gpu_sums_over_groups_and_splits(rows, dtype, processors, monkeypatch):
    """A block of threads has all groups of a stripe, or some, or none."""
    monkeypatch.setattr(hopper, "PROCESSORS", processors)
    made = Uneven.of(rows, dtype)
    got = gpu.scattered_matmul(made.x, made.listed, outputs=400, interpret=True)
    made.check(got)
