"""A correction of low rank that a product on Hopper adds to its sums, last of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Plan, Stream

RANK = 128  # up to which a correction is a term of the kernel


class Term(NamedTuple):
    """Added to the product: x L [rows, rank] times R [rank, outputs], in bfloat16."""

    x: Any
    w: Any

    @classmethod
    def of(
        cls, x, low_rank, plan: Plan, streams: Sequence[Sequence[Stream]]
    ) -> tuple[Plan, Term | None, Any]:
        """(the plan with room for it, the term, what is added to the result).

        Few rows and a small rank are a term; others, and float32 factors that meet
        wider x than bfloat16, are a product beside the kernel. ``streams`` are those of
        x and of W.
        """
        if low_rank is None:
            return plan, None, None
        left, right = low_rank
        inner = jnp.dot(x.reshape(-1, plan.inputs), left.astype(x.dtype))
        exact = plan.narrow or right.dtype == jnp.bfloat16
        if not exact or len(right) > RANK or plan.tuning.rows > LANES:
            right = right.astype(x.dtype)
            beside = jnp.dot(inner, right, preferred_element_type=jnp.float32)
            return plan, None, beside
        rows, more = hopper.terms(inner), -len(right) % hopper.TILE
        rows = jnp.pad(rows, ((0, plan.rows - len(rows)), (0, more)))
        term = cls(rows, jnp.pad(right.astype(jnp.bfloat16), ((0, more), (0, 0))))
        return term._room(plan, streams), term, None

    def _room(self, plan: Plan, streams: Sequence[Sequence[Stream]]) -> Plan:
        """``plan`` with as many stages of the ``streams`` as still fit."""
        t, heights = plan.tuning, (plan.tuning.rows, plan.tile)
        stage = sum(
            height * stream.columns * stream.array.dtype.itemsize
            for height, several in zip(heights, streams, strict=True)
            for stream in several
        )
        own = 2 * len(self.w) * sum(heights)
        fit = hopper.depth(stage, plan.tile, t.rows, plan.steps, hopper.SHARED - own)
        tuning = dataclasses.replace(t, stages=min(t.stages, fit))
        return dataclasses.replace(plan, tuning=tuning)

    def scratch(self, plan: Plan) -> dict[str, Any]:
        """Tiles in shared memory, and the barrier that says that they are full."""
        rank = len(self.w)  # wgmma wants equal swizzles on both sides
        return dict(
            term_x=hopper.tiles((plan.tuning.rows, rank), jnp.bfloat16, 2 * rank),
            term_w=hopper.tiles((rank, plan.tile), jnp.bfloat16, 2 * rank),
            term_full=plgpu.Barrier(num_barriers=1, num_arrivals=2),
        )


def fetch(plan: Plan, pair, scratch, output, row) -> None:
    """Copy the tiles of the outputs and rows of x from these on, out of ``pair``."""
    rows, outputs = pl.ds(row, plan.tuning.rows), pl.ds(output, plan.tile)
    (x, w), full = pair, scratch["term_full"].at[0]
    plgpu.copy_gmem_to_smem(x.at[rows], scratch["term_x"], full)
    plgpu.copy_gmem_to_smem(w.at[:, outputs], scratch["term_w"], full)


def share(plan: Plan, scratch, warpgroup):
    """[64, rows] of the term over the number of splits, a power of two."""
    t, own = plan.tuning, pl.ds(warpgroup * LANES, LANES)

    def scope(acc):
        plgpu.barrier_wait(scratch["term_full"].at[0])
        left, right = scratch["term_w"].at[:, own], scratch["term_x"]
        plgpu.wgmma(acc, compat.transposed(left), compat.transposed(right))
        plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(scope, plgpu.ACC((LANES, t.rows))) * (1 / t.splits)
