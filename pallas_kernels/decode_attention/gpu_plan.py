"""What is decided before the Hopper kernel runs: shares, stages, refusals."""

from __future__ import annotations

import dataclasses

from pallas_kernels import online_softmax as online
from pallas_kernels.decode_attention.gpu_codes import Codes
from pallas_kernels.decode_attention.reference import QuantizedCache

TILE = 64  # slots a step, the M of wgmma
STATISTICS = 16  # rows below the output: peak, total, shifts by zero points, padding
PROCESSORS = 132
SHARED_MEMORY = 227 * 1024  # of a multiprocessor, for all its thread blocks
RESERVED = 2048  # of a thread block: barriers, and gaps between arrays
WIDEST = 64  # columns of a product, so that its sums stay in registers


@dataclasses.dataclass(frozen=True)
class Tuning:
    """``stages`` steps in flight; each sequence and head in ``splits`` shares."""

    stages: int
    splits: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is specialised for; a cache without codes is 16-bit numbers."""

    width: int
    columns: int  # query heads of a key head, in whole eights
    page: int | None
    slots: int  # of a sequence
    keys: Codes | None
    values: Codes | None
    soft_cap: float | None
    window: int | None
    sums: bool
    interpret: bool

    @property
    def copies(self) -> int:
        """Pages of a step."""
        return max(1, TILE // (self.page or TILE))

    @property
    def gathered(self) -> bool:
        """Scales per slot come in the order of the sequence, not of the pages."""
        return self.copies > 1

    @property
    def channels(self) -> bool:
        """The keys' scales are per channel, and multiply the queries."""
        return self.keys is not None and self.keys.per_channel

    @property
    def products(self) -> int:
        """Scaled copies of the queries that a step's keys meet."""
        if self.keys is None:
            return 1
        return max(1, TILE // self.keys.slots) if self.channels else self.keys.blocks

    @property
    def depth(self) -> int:
        """Elements of a query: of channels' zero points also their sums."""
        if self.channels and self.keys.zeros:
            return self.width + self.width // self.keys.places
        return self.width

    @property
    def ring(self) -> dict:
        """What passes through the ring: (rows of a step, slots of a row)."""
        ring = {"k": (TILE, 1), "v": (TILE, 1)}
        if self.channels:
            ring["k_scale"] = (self.products, self.keys.slots)
            if self.keys.zeros:
                ring["k_zero"] = ring["k_scale"]
        return ring

    @property
    def mixes(self) -> int:
        """Scaled copies of the probabilities that a step's values meet."""
        return 1 if self.values is None else self.values.blocks

    def default_tuning(self, rows: int, slots: int) -> Tuning:
        """As many thread blocks as fit the machine once; up to eight stages."""
        stage = sum(
            TILE * self.width * (c.bits if c else 16) // 8
            for c in (self.keys, self.values)
        )
        if self.channels:
            stage += self.products * self.width * 6
        fixed = 2 * self.products * self.columns * self.depth
        fixed += 2 * self.mixes * self.columns * TILE
        fixed += 4 * self.columns * (self.width + STATISTICS + self.sums * TILE)
        fixed += 2 * TILE * self.width if self.values else 0
        # Codes cost instructions: more warps hide each other's latencies, where the
        # registers allow it.
        dense = self.keys is None and self.values is None
        several = self.mixes > 1 or (self.products > 1 and not self.channels)
        for resident in (2, 1) if dense or several else (3, 2, 1):
            room = SHARED_MEMORY // resident - RESERVED - fixed
            stages = min(room // stage, 8)
            if stages >= 2:
                blocks = resident * PROCESSORS
                splits = max(1, min(blocks // rows, -(-slots // TILE)))
                return Tuning(stages, splits)
        raise NotImplementedError(f"heads of width {self.width} exceed shared memory")


def codes_of(cache) -> Codes | None:
    """The static part of a quantized cache."""
    if not isinstance(cache, QuantizedCache):
        return None
    slots, blocks = cache.shape[1] // cache.scale.shape[1], cache.scale.shape[3]
    return Codes(cache.bits, slots, blocks, cache.zero is not None)


def check_served(q, keys, values, pages, interpret: bool) -> None:
    """NotImplementedError for what the kernel cannot read."""
    width = keys.shape[3]
    if width % 64:
        raise NotImplementedError(f"heads of width {width}; accepted: multiples of 64")
    if pages is not None and keys.shape[1] % TILE and TILE % keys.shape[1]:
        raise NotImplementedError(
            f"pages of {keys.shape[1]} slots; accepted: parts or multiples of {TILE}"
        )
    dense = [a for a in (keys, values) if not isinstance(a, QuantizedCache)]
    if dense:
        online.check_dtypes(q, *dense, interpret=interpret)
    columns = -(-q.shape[1] // keys.shape[2] // 8) * 8
    for cache in (keys, values):
        if isinstance(cache, QuantizedCache):
            _check_codes(cache, columns)
    form = codes_of(values)
    if form is not None and form.per_channel:
        raise NotImplementedError(
            f"values that share scales over {form.slots} slots; accepted: one slot "
            "(sums over slots would be scaled step by step)"
        )


def _check_codes(cache: QuantizedCache, columns: int) -> None:
    form, width = codes_of(cache), cache.shape[3]
    if form.bits not in (1, 2, 4, 8):
        raise NotImplementedError(
            f"codes of {form.bits} bits, in several planes; accepted: 1, 2, 4, 8"
        )
    if width * form.bits % 256:
        raise NotImplementedError(
            f"{form.bits}-bit heads of width {width} fill less than 32 bytes"
        )
    if cache.zero is not None and cache.zero.shape != cache.scale.shape:
        raise NotImplementedError(
            f"zeros {cache.zero.shape} and scales {cache.scale.shape}; accepted: alike"
        )
    if form.per_channel:
        products = max(1, TILE // form.slots)
        if form.blocks != width or max(TILE, form.slots) % min(TILE, form.slots):
            raise NotImplementedError(
                f"scales of {form.slots} slots and {width // form.blocks} channels; "
                f"accepted: of one slot, or of one channel and parts or multiples of "
                f"{TILE} slots"
            )
    else:
        products = form.blocks
        if width // form.blocks * form.bits % 16:
            raise NotImplementedError(
                f"scales of {width // form.blocks} codes of {form.bits} bits; "
                "accepted: of whole pairs of bytes"
            )
    if products * columns > WIDEST:
        raise NotImplementedError(
            f"{products} scales in a step for {columns} columns of query heads; "
            f"accepted: {WIDEST // columns}"
        )
