"""Hopper: A^T X B of a token in registers, its largest value, then its codes.

A token is a tile X [a, b] of shared memory: read once. Each warpgroup computes 64 rows
of T = A^T X and, with T as the register operand, of Y = T B; warpgroups exchange the
largest |Y| and write codes once. T has full float32 sums but must be rounded for the
second product. Two terms of bfloat16 would double it; one float16 term, in units of a
power of two for each row, leaves 11 bits: half a percent of 8-bit codes that lie near a
tie differ by one. B, in units of a power of two, is exact in float16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, hopper
from pallas_kernels.hadamard_quantize.reference import check
from pallas_kernels.hopper import LANES

MAGIC = 1.5 * 2**23  # a float32 sum with it rounds to integers, in its low bits
EXPONENT = 0x7F800000
LEAST = 20 << 23  # the exponent of 2^-107: units of rows of zeros
BLOCK = 16  # rows of A come in multiples of wgmma's step
# Every warp holds all: reductions across warps would share one buffer of the block.
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Tokens at a time in a block of threads, tokens of each that are on their way.

    At most ``blocks`` of threads. ``terms``: float16 terms of T (2: codes as from
    float32).
    """

    teams: int
    stages: int = 2
    terms: int = 1
    blocks: int = hopper.PROCESSORS


class Plan(NamedTuple):
    """All that is static about one call; X has ``inputs`` rows, Y ``outputs``.

    Both have ``width`` columns. A team of warpgroups, one for every 64 rows of Y, has a
    token at a time.
    """

    rows: int
    inputs: int
    outputs: int
    width: int
    bits: int
    clip: float
    wide: bool  # B comes as float32, and has two terms
    tuning: Tuning

    @property
    def tiles(self) -> int:
        """Warpgroups of a team."""
        return -(-self.outputs // LANES)

    @property
    def warpgroups(self) -> int:
        return self.tiles * self.tuning.teams

    @property
    def blocks(self) -> int:
        """Of threads."""
        return min(self.tuning.blocks, -(-self.rows // self.tuning.teams))

    @property
    def terms(self) -> tuple[tuple[int, int], ...]:
        """Which terms of T and B meet."""
        left, right = self.tuning.terms, 1 + self.wide
        pairs = ((i, j) for i in range(left) for j in range(right))
        return tuple(pair for pair in pairs if sum(pair) < max(left, right))

    @property
    def code(self):
        """The dtype of a pair of codes."""
        return jnp.dtype(jnp.uint16 if self.bits == 8 else jnp.uint8)

    @property
    def swizzle(self) -> int:
        """Bytes of a swizzled row of A and X, which both must divide."""
        return 2 * min(64, self.inputs & -self.inputs)

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        t, rows = self.tuning, self.tiles * LANES
        team = 2 * t.stages * self.inputs * self.width
        team += rows * (self.width // 2 * self.code.itemsize + 8)
        shared = 2 * rows * self.inputs + 2 * (1 + self.wide) * self.width**2
        return shared + team * t.teams


class Shared(NamedTuple):
    """Shared memory and barriers."""

    left: Any
    right: Any
    x: Any
    out: Any
    peaks: Any  # of rows of Y, for every other token
    powers: Any  # of rows of B, and their inverses
    full: Any
    left_full: Any
    ready: Any
    met: Any
    staged: Any = None  # only in the interpreter, whose wgmma takes no registers


def hadamard_quantize(
    x,
    a,
    b,
    *,
    bits: int = 8,
    clip: float = 1.0,
    interpret: bool = False,
    tuning: Tuning | None = None,
):
    """``reference.hadamard_quantize`` on Hopper's tensor cores, for b of 64 or 128.

    bfloat16 x and A meet exactly; of wider ones two bfloat16 terms do, side by side as
    more rows of X. NotImplementedError for other b, several blocks in a row, and where
    A and a token do not fit in shared memory (beside b = 128: a > 208, float32 a > 80).
    """
    hopper.require(interpret)
    check(x, a, b, bits, clip)
    lead, width, m, n = x.shape[:-1], x.shape[-1], len(a), len(b)
    if n not in (64, 128) or m * n != width:
        raise NotImplementedError(
            f"factors of {m} and {n} for the width {width}; this kernel has a second "
            "factor of 64 or 128, and one block"
        )
    if not x.size:
        codes = (*lead, width) if bits == 8 else (*lead, width // 2)
        kind = jnp.int8 if bits == 8 else jnp.uint8
        return jnp.zeros(codes, kind), jnp.ones((*lead, 1), jnp.float32)
    tokens, left = _operands(x.reshape(-1, m, n), a)
    narrow = x.dtype == a.dtype == jnp.bfloat16
    wide = b.dtype != jnp.bfloat16
    plan = Plan(len(tokens), len(left), m, n, bits, clip, wide, Tuning(1))
    if tuning is None:
        # The interpreter runs a thread after the other: few, of several tokens each.
        blocks = 2 if interpret else hopper.PROCESSORS
        tuning = default_tuning(plan, 1 if narrow and not wide else 2, blocks)
    plan = plan._replace(tuning=tuning)
    if plan.bytes > hopper.SHARED - hopper.RESERVED:
        raise NotImplementedError(
            f"a first factor of {m} ({x.dtype} x, {a.dtype}); it and a token take "
            f"{plan.bytes} bytes of shared memory of {hopper.SHARED}"
        )
    with compat.interpret_gpu() if interpret else contextlib.nullcontext():
        codes, scale = _call(plan, interpret)(tokens, left, *_halves(b))
    if bits == 8:
        codes = lax.bitcast_convert_type(codes, jnp.int8)
    return codes.reshape(*lead, -1), scale.reshape(*lead, 1)


def default_tuning(plan: Plan, terms: int, blocks: int) -> Tuning:
    """As many tokens at a time as there are, and as registers and memory hold."""
    most = {1: 4, 2: 2}.get(plan.tiles, 1)
    teams = max(1, min(most, -(-plan.rows // blocks)))
    for stages in (2, 1):
        for count in range(teams, 0, -1):
            made = Tuning(count, stages, terms, blocks)
            if plan._replace(tuning=made).bytes <= hopper.SHARED - hopper.RESERVED:
                return made
    return Tuning(1, 1, terms, blocks)


def _operands(x, a):
    """X [tokens, K, b] and A [K, a] in bfloat16, K and a in multiples of 16.

    Wider ones are A_h^T X_h + A_l^T X_h + A_h^T X_l, one product of three times the K.
    """
    short = (0, -len(a) % BLOCK)
    a, x = jnp.pad(a, (short, short)), jnp.pad(x, ((0, 0), short, (0, 0)))
    if x.dtype == a.dtype == jnp.bfloat16:
        return x, a
    (xh, xl), (ah, al) = (
        (v.astype(jnp.bfloat16), hopper.rest(v).astype(jnp.bfloat16)) for v in (x, a)
    )
    return jnp.concatenate([xh, xh, xl], 1), jnp.concatenate([ah, al, ah])


def _halves(b) -> list:
    """B's even and odd columns: the halves of words of two bfloat16, else apart."""
    if b.dtype != jnp.bfloat16:
        return [b[:, i::2].astype(jnp.float32) for i in range(2)]
    return [lax.bitcast_convert_type(b.reshape(len(b), -1, 2), jnp.uint32)]


def _call(plan: Plan, interpret: bool):
    t, n, tiles = plan.tuning, plan.width, plan.tiles
    warpgroups, half = plan.warpgroups, n // 2
    swizzle = plgpu.SwizzleTransform(half * plan.code.itemsize)
    x = hopper.tiles((t.teams * t.stages, plan.inputs, n), jnp.bfloat16, plan.swizzle)
    scratch = dict(
        left=hopper.tiles((plan.inputs, LANES * tiles), jnp.bfloat16, plan.swizzle),
        # Even and odd columns are tiles of their own.
        right=hopper.tiles((1 + plan.wide, n, n), jnp.float16, 2 * half),
        x=x,
        out=plgpu.SMEM((warpgroups, LANES, half), plan.code, transforms=(swizzle,)),
        peaks=plgpu.SMEM((2 * t.teams, LANES * tiles), jnp.float32),
        powers=plgpu.SMEM((2, n), jnp.float32),
        full=plgpu.Barrier(num_barriers=t.teams * t.stages),
        left_full=plgpu.Barrier(),
        ready=plgpu.Barrier(num_arrivals=warpgroups),
        met=plgpu.Barrier(num_barriers=t.teams, num_arrivals=tiles),
    )
    if interpret:
        shape = (warpgroups, t.terms, LANES, n)
        scratch["staged"] = plgpu.SMEM(shape, jnp.float16)
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(
            jax.ShapeDtypeStruct((plan.rows, plan.outputs, half), plan.code),
            jax.ShapeDtypeStruct((plan.rows,), jnp.float32),
        ),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _kernel(plan: Plan, *refs, **scratch):
    """Tokens of one team; each warpgroup has 64 rows of Y."""
    x_g, left_g, *right_g, codes_g, scale_g = refs
    shared, t = Shared(**scratch), plan.tuning
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    team, tile = lax.div(warpgroup, plan.tiles), lax.rem(warpgroup, plan.tiles)
    first, stride = block * t.teams + team, plan.blocks * t.teams
    count = lax.div(plan.rows - first + (stride - 1), stride)

    def fetch(i):
        at = team * t.stages + lax.rem(i, t.stages)
        token = x_g.at[first + i * stride]
        plgpu.copy_gmem_to_smem(token, shared.x.at[at], shared.full.at[at])

    @pl.when(warpgroup == 0)
    def _():
        # Beyond A's last column the copy engine fills in zeros.
        whole = left_g.at[:, pl.ds(block * 0, LANES * plan.tiles)]
        plgpu.copy_gmem_to_smem(whole, shared.left, shared.left_full)

    for i in range(t.stages):
        pl.when((tile == 0) & (i < count))(lambda i=i: fetch(jnp.int32(i)))
    unit = _convert(plan, shared, right_g, warpgroup)
    plgpu.barrier_wait(shared.left_full)

    @pl.loop(0, count)
    def _(i):
        at = team * t.stages + lax.rem(i, t.stages)
        plgpu.barrier_wait(shared.full.at[at])
        y, units = _transform(plan, shared, at, tile, warpgroup)
        units = units * unit
        peaks = shared.peaks.at[2 * team + lax.rem(i, 2)]
        peaks[pl.ds(tile * LANES, LANES)] = jnp.max(jnp.abs(y), axis=1) * units
        plgpu.barrier_arrive(shared.met.at[team])
        plgpu.barrier_wait(shared.met.at[team])
        # Every warpgroup of the team is done with the token.
        more = (tile == 0) & (i + t.stages < count)
        pl.when(more)(lambda: fetch(i + t.stages))
        largest = jnp.max(compat.load(peaks, COLUMNS))
        top = 2 ** (plan.bits - 1) - 1
        scale = jnp.where(largest == 0, 1.0, largest * (plan.clip / top))
        token = first + i * stride

        @pl.when(tile == 0)
        def _():
            scale_g[token] = scale

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.out[warpgroup] = _codes(plan, y, units / scale)
        plgpu.commit_smem()
        rows = pl.ds(tile * LANES, LANES)
        plgpu.copy_smem_to_gmem(shared.out.at[warpgroup], codes_g.at[token, rows])

    plgpu.wait_smem_to_gmem(0)


def _transform(plan: Plan, shared: Shared, at, tile, warpgroup):
    """A warpgroup's rows of Y [64, b], each in units [64]."""

    def first(acc):
        own = shared.left.at[:, pl.ds(tile * LANES, LANES)]
        plgpu.wgmma(acc, compat.transposed(own), shared.x.at[at])
        return acc[...]

    t = pl.run_scoped(first, plgpu.ACC((LANES, plan.width)))
    units, inverse = _power(jnp.max(jnp.abs(t), axis=1))
    parts = _terms(t * hopper.across(inverse, plan.width), plan.tuning.terms)
    if shared.staged is not None:
        for i, part in enumerate(parts):
            shared.staged[warpgroup, i] = part
        plgpu.commit_smem()
        parts = [shared.staged.at[warpgroup, i] for i in range(len(parts))]

    def second(acc):
        for i, j in plan.terms:
            plgpu.wgmma(acc, parts[i], shared.right.at[j])
        return acc[...]

    return pl.run_scoped(second, plgpu.ACC((LANES, plan.width))), units


def _codes(plan: Plan, y, factor):
    """Pairs of codes, an even column's below the next one's."""
    top = float(2 ** (plan.bits - 1) - 1)
    scaled = y * hopper.across(factor, plan.width)
    if plan.clip < 1:
        scaled = jnp.clip(scaled, -top, top)
    raised = scaled + (MAGIC + (8 if plan.bits == 4 else 0))
    words, half = lax.bitcast_convert_type(raised, jnp.uint32), plan.width // 2
    even, odd = words[:, :half], words[:, half:]
    pairs = (even & jnp.uint32(2**plan.bits - 1)) | (odd << jnp.uint32(plan.bits))
    return pairs.astype(plan.code)


def _convert(plan: Plan, shared: Shared, refs, warpgroup):
    """B as float16 in shared memory, even columns before odd ones; returns its unit.

    Read twice, the second time from the cache, because its largest value comes first.
    """
    half, chunks = plan.width // 2, plan.width // LANES

    def each(function):
        for c in range(chunks):
            own = warpgroup == c % plan.warpgroups
            pl.when(own)(lambda c=c: function(pl.ds(c * LANES, LANES)))

    def meet():
        plgpu.barrier_arrive(shared.ready)
        plgpu.barrier_wait(shared.ready)

    def measure(rows):
        even, odd = (jnp.abs(half) for half in _columns(refs, rows))
        powers = _power(jnp.max(jnp.maximum(even, odd), axis=1))
        for i, power in enumerate(powers):
            shared.powers[i, rows] = power

    def write(rows):
        for i, columns in enumerate(_columns(refs, rows)):
            terms = _terms(columns * inverse, 1 + plan.wide)
            for j, term in enumerate(terms):
                shared.right[j, rows, pl.ds(i * half, half)] = term

    each(measure)
    meet()
    unit = jnp.max(compat.load(shared.powers.at[0], COLUMNS))
    inverse = jnp.min(compat.load(shared.powers.at[1], COLUMNS))
    each(write)
    plgpu.commit_smem()
    meet()
    return unit


def _columns(refs, rows):
    """64 rows of B's even and odd columns, float32."""
    load = lambda ref: compat.load(  # noqa: E731
        ref.at[rows], plgpu.Layout.WGMMA, optimized=False
    )
    if len(refs) == 2:
        return [load(ref) for ref in refs]
    words = load(refs[0])
    both = words << jnp.uint32(16), words & jnp.uint32(0xFFFF0000)
    return [lax.bitcast_convert_type(half, jnp.float32) for half in both]


def _power(values):
    """The powers of two at or below positive ``values``, and their inverses."""
    bits = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(EXPONENT)
    bits = jnp.maximum(bits, jnp.uint32(LEAST))
    inverse = jnp.uint32(254 << 23) - bits
    return tuple(lax.bitcast_convert_type(v, jnp.float32) for v in (bits, inverse))


def _terms(values, count: int) -> list:
    """float16 terms, the largest first."""
    found = []
    for _ in range(count):
        found.append(values.astype(jnp.float16))
        values = values - found[-1].astype(jnp.float32)
    return found
