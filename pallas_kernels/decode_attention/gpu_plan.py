"""What is decided before the Hopper kernel runs: shares, stages, refusals."""

from __future__ import annotations

import dataclasses

from pallas_kernels import online_softmax as online
from pallas_kernels.decode_attention.reference import QuantizedCache

TILE = 64  # slots a step, the M of wgmma
BLOCKS = 264  # thread blocks that fill the machine once: two a multiprocessor
SHARED_MEMORY = 108 * 1024  # of one of them


@dataclasses.dataclass(frozen=True)
class Tuning:
    """``stages`` steps in flight; each sequence and head in ``splits`` shares."""

    stages: int
    splits: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is specialised for: caches by bits (None: 16-bit numbers)."""

    tuning: Tuning
    width: int
    page: int | None
    key_bits: int | None
    value_bits: int | None
    soft_cap: float | None
    window: int | None
    sums: bool
    interpret: bool

    @property
    def copies(self) -> int:
        """Pages of a step."""
        return max(1, TILE // (self.page or TILE))


def default_tuning(rows: int, slots: int, width: int, bits) -> Tuning:
    """Shares that fill the machine once; as many stages as fit, up to eight."""
    stage = sum(TILE * width * (b or 16) // 8 for b in bits)
    staging = sum(TILE * width * 2 for b in bits if b is not None)
    splits = max(1, min(BLOCKS // rows, -(-slots // TILE)))
    stages = (SHARED_MEMORY - staging) // stage
    if stages < 2:
        raise NotImplementedError(f"heads of width {width} exceed shared memory")
    return Tuning(min(stages, 8), splits)


def check_served(q, keys, values, pages, interpret: bool) -> None:
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
    for cache in (keys, values):
        if isinstance(cache, QuantizedCache):
            _check_codes(cache)


def _check_codes(cache: QuantizedCache) -> None:
    slots = cache.shape[1]
    if cache.bits not in (1, 2, 4, 8):
        raise NotImplementedError(f"codes of {cache.bits} bits; accepted: 1, 2, 4, 8")
    if cache.scale.shape != (*cache.shape[:3], 1):
        raise NotImplementedError(
            f"scales {cache.scale.shape} for {cache.shape}; accepted: one per slot"
        )
    if slots % TILE:
        raise NotImplementedError(
            f"{slots} slots of codes; accepted: multiples of {TILE}"
        )
    if cache.shape[3] * cache.bits % 256:
        raise NotImplementedError(
            f"{cache.bits}-bit heads of width {cache.shape[3]} fill less than 32 bytes"
        )
