"""What every exchange format of integer codes says: value = scale (code - zero).

A ``Scheme`` is the part known without reading a number, ``Affine`` the numbers in
NumPy as [in, out] and [groups, out], ``Stored`` the same read from weights of a model
when they are asked for. ``weight`` makes a weight type of it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.core.formats import ActivationFormat, Integer
from jaxllm.core.packing import pack
from jaxllm.core.weights import (
    ActivationQuantized,
    Permutation,
    Quantized,
    Sparse,
    Transformed,
    Weight,
    materialize,
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Integers of ``bits``, one scale for ``block`` inputs (None: all of them).

    The map is [features, outputs]. ``symmetric``: the zero point is 2^(bits - 1)
    everywhere. ``dtype`` is that of the values. ``ordered``: the inputs of a group
    are not neighbours (activation order). ``inputs`` is how the input of the map is
    rounded first, if it is.
    """

    bits: int
    symmetric: bool
    block: int | None
    features: int
    outputs: int
    dtype: str = "float32"
    ordered: bool = False
    inputs: ActivationFormat | None = None

    @property
    def groups(self) -> int:
        return -(-self.features // min(self.block or self.features, self.features))

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        block = "one group" if self.block is None else f"groups of {self.block}"
        inputs = (
            "" if self.inputs is None else f" with inputs of {self.inputs.bits} bits"
        )
        return f"{kind} int{self.bits} in {block}{inputs}"


@dataclasses.dataclass(frozen=True)
class Affine:
    """One linear map: codes uint8 [in, out], scale and zero (uint8) [groups, out].

    ``order`` [in] lists the inputs in the order in which ``codes`` has them (None:
    their own).
    """

    scheme: Scheme
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    order: np.ndarray | None = None


def scheme_of(w) -> Scheme:
    """The scheme of a weight.

    Raises ``TypeError`` with the reason where its values are no such integers.
    """
    inner = _quantized(w)
    if not isinstance(inner.format, Integer):
        raise TypeError(f"has codes of {inner.format!r}, which are no integers")
    zero = inner.zero
    if isinstance(zero, Weight):
        raise TypeError("has quantized zero points")
    if zero is not None and jnp.issubdtype(zero.dtype, jnp.floating):
        raise TypeError("has real-valued zero points")
    if inner.format.bits == 1:
        raise TypeError("has codes of one bit")
    return Scheme(
        inner.format.bits,
        zero is None,
        inner.block,
        *w.shape,
        dtype=str(inner.dtype),
        ordered=isinstance(w, Transformed),
        inputs=w.format if isinstance(w, ActivationQuantized) else None,
    )


def _unwrapped(w):
    """A weight without what happens to its input: another order, or rounding."""
    if isinstance(w, Transformed) and isinstance(w.op, Permutation):
        return w.inner
    return w.inner if isinstance(w, ActivationQuantized) else w


def _quantized(w) -> Quantized:
    """The quantized part of a weight that is nothing else at run time."""
    w = _unwrapped(w)
    inner = w.values if isinstance(w, Sparse) else w
    if isinstance(inner, Quantized):
        return inner
    raise TypeError(f"is {describe(w)}")


def describe(w) -> str:
    """A weight's type with what it is made of: ``Sum(Quantized, LowRank)``."""
    if not isinstance(w, Weight):
        return "dense"
    inner = [getattr(w, name, None) for name in ("inner", "values")]
    parts = (*getattr(w, "terms", ()), *inner)
    names = ", ".join(describe(p) for p in parts if isinstance(p, Weight))
    if isinstance(w, Transformed):
        names = f"{type(w.op).__name__}, {names or 'dense'}"
    return type(w).__name__ + (f"({names})" if names else "")


@dataclasses.dataclass(frozen=True)
class Stored:
    """The numbers of a linear map, read from the model's weights when asked for.

    ``weights()`` gives the parts of one tensor, ``fuse`` puts arrays [..., out] of
    the parts together (and in the order of the other side's channels).
    """

    scheme: Scheme
    weights: Callable[[], list[Any]]
    fuse: Callable[[list[np.ndarray]], np.ndarray]

    @property
    def codes(self) -> np.ndarray:
        return self.fuse([_codes(w) for w in self.weights()])

    @property
    def scale(self) -> np.ndarray:
        """Scales; below float16's range those of groups of zeros are 0 as well."""
        scale = self.fuse([_scale(w) for w in self.weights()])
        tiny = np.abs(scale.astype(np.float32)) < 2.0**-24
        return np.where(tiny & self._idle(), 0, scale) if tiny.any() else scale

    def _idle(self) -> np.ndarray:
        """Groups [groups, out] whose values are all zero, whatever their scale."""
        size = min(self.scheme.block or self.scheme.features, self.scheme.features)
        zero = np.repeat(self.zero, size, 0)[: self.scheme.features]
        starts = np.arange(0, self.scheme.features, size)
        return ~np.logical_or.reduceat(self.codes != zero, starts, axis=0)

    @property
    def zero(self) -> np.ndarray:
        return self.fuse([_zero(w) for w in self.weights()])

    @property
    def order(self) -> np.ndarray | None:
        first = self.weights()[0]
        return np.asarray(first.op.order) if isinstance(first, Transformed) else None


def _codes(w) -> np.ndarray:
    """Codes [in, out]; where a mask holds no value the code of zero."""
    w = _unwrapped(w)
    if isinstance(w, Quantized):
        return np.asarray(w.codes()).T
    dense = np.asarray(w.full_codes()).T
    block = min(w.values.block or len(dense), len(dense))
    zero = np.repeat(_zero(w), block, 0)[: len(dense)]
    return np.where(np.asarray(w.support), dense, zero)


def _scale(w) -> np.ndarray:
    scale = _quantized(w).scale
    if isinstance(scale, Weight):
        return np.asarray(materialize(scale)).reshape(w.shape[1], -1).T
    return np.asarray(scale).T


def _zero(w) -> np.ndarray:
    inner = _quantized(w)
    if inner.zero is not None:
        return np.asarray(inner.zero).T
    return np.full(_scale(w).shape, int(inner.format.offset), np.uint8)


def weight(a: Affine, dtype: str):
    """The weight type of these numbers, with values of ``dtype``.

    Scales are kept exactly: as bfloat16 where that holds them, else as they are. Zero
    points that are all 2^(bits - 1) are those of the symmetric form.
    """
    codes, scale = jnp.asarray(np.ascontiguousarray(a.codes.T)), narrowed(a.scale.T)
    symmetric = bool((a.zero == a.scheme.middle).all())
    made = Quantized(
        pack(codes, a.scheme.bits),
        jnp.asarray(np.ascontiguousarray(scale)),
        None if symmetric else jnp.asarray(np.ascontiguousarray(a.zero.T)),
        Integer(a.scheme.bits, symmetric),
        a.scheme.block,
        a.scheme.features,
        str(dtype),
    )
    if a.scheme.inputs is not None:
        return ActivationQuantized(made, a.scheme.inputs)
    if a.order is None:
        return made
    return Transformed(Permutation(jnp.asarray(a.order, jnp.int32)), made)


def narrowed(scale: np.ndarray) -> np.ndarray:
    """Scales as bfloat16 where that holds all of them, else as they are."""
    fits = exact(scale, ml_dtypes.bfloat16)
    return scale.astype(ml_dtypes.bfloat16) if fits else scale


def exact(values: np.ndarray, dtype) -> bool:
    """Whether another float type holds the values unchanged."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype).astype(np.float64)
    return bool((narrow == values.astype(np.float64)).all())
