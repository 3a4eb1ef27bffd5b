"""What is decided before the Hopper kernel runs: tiles, planes, refusals."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import hopper, hopper_plan
from pallas_kernels import tuning as tables
from pallas_kernels.hopper import LANES
from pallas_kernels.hopper_plan import Stream, Tuning
from pallas_kernels.planes import parts, spans
from pallas_kernels.quantized_matmul import fragments


class Plane(NamedTuple):
    """One plane of codes: bits, place of its lowest bit, bytes per step and block."""

    part: int
    low: int
    bytes: int
    block: int

    @property
    def places(self) -> int:
        return 8 // self.part

    def stream(self, codes) -> Stream:
        """The plane itself, through the ring."""
        return Stream(codes, self.bytes, self.bytes)


@dataclasses.dataclass(frozen=True)
class Plan(hopper_plan.Plan):
    """All that is static about one call."""

    planes: tuple[Plane, ...]
    zero: str  # "none" (``middle`` instead), "integer" or "float"
    middle: float
    levels: tuple[float, ...] | None

    def stream(self, x, plane: Plane) -> Stream:
        """x [M, K] in the order of the plane's codes."""
        x = fragments.in_order(x, plane.bytes, plane.places)
        return Stream(x, self.tuning.inputs, 2 * plane.block)


def refuse(inputs, outputs, bits, block, levels, planes) -> None:
    """NotImplementedError with the reason for what the kernel cannot serve."""
    if levels is not None and (bits != 4 or len(levels) > 16):
        raise NotImplementedError(f"a table of {bits}-bit codes; only 4 bits have one")
    if outputs % LANES:
        raise NotImplementedError(f"{outputs} outputs; wgmma needs a multiple of 64")
    for part, plane in zip(parts(bits), planes, strict=True):
        row, group = plane.shape[1], (block or inputs) * part / 8
        if row % 16 or row * 8 != inputs * part:
            raise NotImplementedError(
                f"rows of {row} bytes ({inputs} inputs); the copy engine needs 16n"
            )
        if block is not None and (group % fragments.TILE or inputs % block):
            raise NotImplementedError(
                f"blocks of {block} of {inputs} inputs are {group:g} bytes of the "
                f"{part}-bit plane; wgmma needs whole blocks of 16n bytes"
            )


def tuned(op: str, shape, narrow: bool, interpret: bool) -> Tuning:
    """This device's table for ``op``, else the default rule."""
    found = tables.look_up(op, shape) if narrow and not interpret else None
    return Tuning(**found) if found else default_tuning(*shape, not narrow)


def default_tuning(rows, inputs, outputs, bits, block, exact=False) -> Tuning:
    """By the roofline: fill all multiprocessors with few rows, reuse W with many.

    ``exact`` keeps scales in float32 for many rows too.
    """
    step = step_of(inputs, bits, block)
    # Sums of each block of a step live in registers beside the total.
    most = 128 if not exact else 64 if step <= block else 32
    tile = next((r for r in (8, 16, 32, 64) if rows <= r <= most), most)
    steps = inputs // step
    warpgroups, split = hopper.spread(rows, tile, outputs, steps)
    lanes = LANES * warpgroups
    stage = len(parts(bits)) * 2 * tile * step + lanes * step * bits // 8
    stages = hopper.depth(stage, lanes, tile, steps // split)
    return Tuning(tile, step, stages, split, warpgroups, exact or tile <= 32)


def step_of(inputs: int, bits: int, block: int, most: int = 64) -> int:
    """The most inputs of a step that suit blocks, and ``most`` bytes of a plane."""
    sizes = (512, 256, 128, 64, 32)
    step = next((s for s in sizes if _fits(s, inputs, bits, block, most)), 0)
    if not step:
        raise NotImplementedError(
            f"no step of 32 to {most} bytes divides {inputs} inputs into whole blocks "
            f"of {block} at {bits} bits"
        )
    return step


def _fits(step: int, inputs: int, bits: int, block: int, most: int) -> bool:
    """Whole blocks in a step, or steps in a block; 32 to ``most`` bytes of a plane."""
    low, high = min(parts(bits)) * step // 8, max(parts(bits)) * step // 8
    return (
        inputs % step == 0
        and (step % block == 0 or block % step == 0)
        and low >= 32
        and high <= (2 * most if bits == 8 else most)
    )


def plan_of(x, outputs, zero, bits, block, levels, offset, tuning, narrow) -> Plan:
    """The plan for padded ``x`` [M, K] and these arguments."""
    planes = []
    for part, low in spans(bits):
        size = tuning.inputs * part // 8
        planes.append(
            Plane(part, low, size, min(size, (block or x.shape[1]) * part // 8))
        )
    kind = "none"
    if zero is not None and levels is None:
        whole = jnp.issubdtype(zero.dtype, jnp.integer)
        kind = "integer" if whole else "float"
    return Plan(
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=outputs,
        block=None if block == x.shape[1] else block,
        planes=tuple(planes),
        zero=kind,
        middle=float(2 ** (bits - 1) if offset is None else offset),
        levels=levels,
        narrow=narrow,
        tuning=tuning,
    )
