"""What the TPU kernels do beyond the named cases: loops, roundings, reports."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_static
from pallas_kernels.quantized_matmul import cases, reference, tpu, tpu_product
from pallas_kernels.quantized_matmul.tpu_planes import Tuning
from pallas_kernels.scaled_matmul import cases as scaled_cases
from pallas_kernels.scaled_matmul import reference as scaled_reference
from pallas_kernels.scaled_matmul import tpu as scaled_tpu
from pallas_kernels.shapes import Linear
from pallas_kernels.two_level_matmul import cases as two_level_cases
from pallas_kernels.two_level_matmul import reference as two_level_reference
from pallas_kernels.two_level_matmul import tpu as two_level_tpu

SMALL = Linear("tiny", "small", 1024, 64)
CAREFUL = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def arguments(bits: int, rows: int, dtype):
    inputs = dict(rows=rows, linear=SMALL, bits=bits, block=128, zeros=True, rank=4)
    return cases.make(jax.random.key(3), **inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("bits", "rows", "chunk"), [(4, 72, 32), (3, 40, 40)])
def test_many_rows_share_a_tile_of_the_weight(bits, rows, chunk, dtype):
    """Rows in several chunks and a rest, inputs in two steps, one or two planes."""
    args = arguments(bits, rows, dtype)
    options = {"bits": bits, "block": 128}
    depth = 512 if bits == 4 else 1024
    tuning = Tuning(rows, 32, depth, split=False, chunk=chunk)
    with pltpu.force_tpu_interpret_mode(CAREFUL):
        got = tpu.quantized_matmul(*args, **options, tuning=tuning)
    wide = (args[0].astype(jnp.float32), *args[1:])
    want = reference.quantized_matmul(*wide, **options)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    assert jnp.linalg.norm(got - want) <= tolerance * jnp.linalg.norm(want)


def test_bfloat16_arithmetic_rounds_once(monkeypatch):
    """Codes times scales of bfloat16 are the same tile in either arithmetic."""
    args = arguments(4, 72, jnp.bfloat16)
    run = lambda: tpu.quantized_matmul(*args, bits=4, block=128, interpret=True)  # noqa: E731
    plain = run()
    monkeypatch.setattr(tpu_product, "bf16_arithmetic", lambda: True)
    assert jnp.array_equal(plain, run())


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scaled_sums_over_steps_and_chunks(kind, block):
    """Rows in two chunks and a rest, inputs in two steps."""
    inputs = dict(rows=72, linear=SMALL, kind=kind, block=block)
    args = scaled_cases.make(jax.random.key(5), **inputs)
    options = {"block": block, "out_dtype": jnp.float32}
    tuning = scaled_tpu.Tuning(72, 32, 512, chunk=32)
    with pltpu.force_tpu_interpret_mode(CAREFUL):
        got = scaled_tpu.scaled_matmul(*args, **options, tuning=tuning)
    want = scaled_reference.scaled_matmul(*args, **options)
    assert jnp.linalg.norm(got - want) <= 1e-6 * jnp.linalg.norm(want)


@pytest.mark.parametrize("block", [128, 256])
def test_two_levels_of_many_rows(block):
    """More rows than a decoding step has share an int8 tile of the weight."""
    inputs = dict(rows=two_level_tpu.FEW + 8, linear=SMALL, block=block, zeros=True)
    args = two_level_cases.make(jax.random.key(4), **inputs)
    options = {"block": block, "out_dtype": jnp.float32}
    tuning = two_level_tpu.Tuning(96, 32, 512)  # in two steps
    with pltpu.force_tpu_interpret_mode(CAREFUL):
        got = two_level_tpu.two_level_matmul(*args, **options, tuning=tuning)
    want = two_level_reference.two_level_matmul(*args, **options)
    np.testing.assert_allclose(got, want, rtol=1e-6)


BUNDLES = """\
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %p1 = scmp.eq.s32.totalorder %s2, 0 }
   0x2   : > { %7 = sbr.rel (%p1) target = $region9 }
   0x3   : > { nop } /* Start region 8 */
   0x4 LB: >> { %p2 = scmp.ge.s32.totalorder %s3, 6 ;; %v1 = vmatmul %v0 }
   0x5   : >> { %8 = sbr.rel (!%p2) target = $region4 }
   0x6 PF: > { %v9 = vst } /* Start/End empty region 9 */
   0x7   :  { exit }
"""
TABLE = """\
== CAPACITY:
MXU, VSTORE, VSTORE:SPILL
 2 1 1
== UTILIZATION:
""" + "\n".join(["0 0 0"] * 3 + ["0 1 1"] + ["2 0 0"] * 2 + ["0 1 1", "0 0 0"])


def test_loops_count_as_often_as_they_turn():
    parts, skipped = tpu_static.stretches(BUNDLES)
    assert [(p.first, p.count, p.turns) for p in parts if p.loops > 1] == [(4, 2, 6)]
    assert skipped == [range(2, 6)]
    table = tpu_static.Table.read(TABLE)
    found = tpu_static.figures(table, BUNDLES, (3, 4))
    assert found["hot"] == {
        "bundles": 12,
        "MXU": 1.0,
        "VSTORE": 0.0,
        "VSTORE:SPILL": 0,
    }
    # What is jumped over holds the busiest loop: it belongs to every step.
    assert found["step"]["bundles"] == 2 + 1 + 12 + 1
    assert found["step"]["VSTORE:SPILL"] == 2
    assert not found["open"]


def test_a_loop_that_ends_by_data_counts_once_and_says_so():
    by_data = BUNDLES.replace("%s3, 6", "%s3, %s4").replace(
        "{ %p2", "{ /* Start region 4 */ %p2"
    )
    found = tpu_static.figures(tpu_static.Table.read(TABLE), by_data, (3, 4))
    assert found["open"] and found["hot"]["bundles"] == 2


RARE = """\
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %p1 = scmp.eq.s32.totalorder %s2, 0 }
   0x2 LB: >> { %p2 = scmp.ge.s32.totalorder %s3, 2 ;; %v1 = vmatmul %v0 }
   0x3   : >> { %7 = sbr.rel (!%p2) target = $region4 }
   0x4 PF: > { %8 = sbr.rel (%p1) target = $region9 }
   0x5   : > { nop } /* Start region 8 */
   0x6 LB: >> { %p3 = scmp.ge.s32.totalorder %s4, 6 ;; %v1 = vmatmul %v0 }
   0x7   : >> { %9 = sbr.rel (!%p3) target = $region5 }
   0x8 PF: > { %v9 = vst } /* Start/End empty region 9 */
   0x9   :  { exit }
"""


def test_the_busiest_loop_is_that_of_an_average_step():
    """Six turns in one of four steps are fewer than two turns in each."""
    rows = [[0, 0, 0], [0, 0, 0], *[[2, 0, 0]] * 2, [0, 0, 0], [0, 0, 0]]
    table = tpu_static.Table(
        ["MXU", "VSTORE", "VSTORE:SPILL"],
        [2, 1, 1],
        [*rows, *[[2, 0, 0]] * 2, [0, 1, 0], [0, 0, 0]],
    )
    found = tpu_static.figures(table, RARE, (3, 4))
    assert found["hot"]["bundles"] == 2 * 2
    assert found["step"]["bundles"] == round(1 + 2 * 2 + (2 + 6 * 2) / 4 + 1)
