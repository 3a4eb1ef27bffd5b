"""Sums of scaled binary or ternary matrices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxllm.core.arrays import Leaf, static
from jaxllm.core.packing import pack, pack_trits, unpack, unpack_trits
from jaxllm.core.weights.base import LEADING, Names, Weight
from pallas_kernels.plane_matmul import op as plane_matmul

TERNARY = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes(Weight):
    """W = sum_p alpha_p D_p (+ shift), the entries of D_p from ``digits``.

    ``planes`` [plane, out, bytes] hold one bit per weight for two digits and 8 / 5
    bits for three; ``alpha`` [out, blocks, plane]; ``shift`` [out, blocks] or None.
    ``block`` inputs share coefficients (None: all of an output).
    """

    planes: Leaf[UInt8[Array, "*lead plane out _"]]
    alpha: Leaf[Float[Array, "*lead out blocks plane"]]
    shift: Leaf[Float[Array, "*lead out blocks"] | None]
    digits: tuple[float, ...] = static()
    block: int | None = static()
    features: int = static()
    dtype: str = static("float32")

    @classmethod
    def encode(cls, codes, alpha, shift, digits, block, dtype) -> Planes:
        """From digit indices ``codes`` [plane, out, in]."""
        packed = pack_trits(codes) if len(digits) == TERNARY else pack(codes, 1)[0]
        return cls(packed, alpha, shift, digits, block, codes.shape[-1], str(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, self.planes.shape[-2]

    def codes(self) -> UInt8[Array, "*lead plane out in"]:
        if len(self.digits) == TERNARY:
            return unpack_trits(self.planes, self.features)
        return unpack((self.planes,), 1, self.features)

    def materialize(self) -> Float[Array, "*lead in out"]:
        table = jnp.asarray(np.asarray(self.digits, np.float32))
        digits = jnp.moveaxis(table[self.codes()], -3, -1)
        spread = lambda p: self._spread(p.astype(jnp.float32))  # noqa: E731
        alpha = jnp.swapaxes(spread(jnp.swapaxes(self.alpha, -1, -2)), -1, -2)
        dense = (digits * alpha).sum(-1)
        if self.shift is not None:
            dense = dense + spread(self.shift)
        return jnp.swapaxes(dense, -1, -2).astype(self.dtype)

    def _spread(self, per_block):
        """One value per input [..., in] from one per block [..., blocks]."""
        if self.block is None:
            return jnp.repeat(per_block, self.features, -1)
        return jnp.repeat(per_block, self.block, -1)[..., : self.features]

    def dot(self, x):
        digits = np.asarray(self.digits, np.float32)
        step, middle = digits[-1] - digits[0], (digits[-1] + digits[0]) / 2
        if self.alpha.ndim != 3:
            return self.expanded(x, LEADING)
        if len(digits) == TERNARY and digits[1] != middle:
            return self.expanded(x, f"digits {self.digits} are not evenly spaced")
        alpha = self.alpha.astype(jnp.float32)
        bias = None if self.shift is None else self.shift.astype(jnp.float32)
        if middle:  # digits are middle + step / 2 times -1, (0,) 1
            own = alpha.sum(-1) * middle
            bias = own if bias is None else bias + own
        return plane_matmul(
            x,
            tuple(self.planes),
            tuple(jnp.moveaxis(alpha * (step / 2), -1, 0)),
            bias,
            kind="trits" if len(digits) == TERNARY else "binary",
            block=self.block,
        )

    def axes(self, names: Names) -> Planes:
        inner, outer = names
        along = None if self.block is None else inner
        shift = None if self.shift is None else (outer, along)
        return dataclasses.replace(
            self, planes=(None, outer, inner), alpha=(outer, along, None), shift=shift
        )
