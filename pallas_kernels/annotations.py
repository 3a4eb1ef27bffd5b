"""Shapes and dtypes that annotations speak of: jaxtyping's, where it is installed.

The tests check them at run time; without jaxtyping an array is just an array.
"""

from __future__ import annotations

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Int8",
    "Integer",
    "Shaped",
    "UInt8",
    "UInt16",
]

try:
    from jaxtyping import Array, Bool, Float, Int, Int8, Integer, Shaped, UInt8, UInt16
except ModuleNotFoundError:
    from jax import Array

    class Shaped:  # type: ignore[no-redef]
        """``Shaped[Array, "batch in"]`` is ``Array``, and so are the others'."""

        def __class_getitem__(cls, _):
            return Array

    Bool = Float = Int = Int8 = Integer = UInt8 = UInt16 = Shaped  # type: ignore
