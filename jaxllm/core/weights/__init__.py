"""Weights are values: ``dot``, ``rows``, ``materialize`` and ``nbytes`` for all.

A linear map is a plain array [in, out] or one of the weight types of this folder;
leading axes (experts) come before. These functions are the only place where
compression meets the model.
"""

from jaxllm.core.weights.activation import ActivationQuantized, StaticInput
from jaxllm.core.weights.base import (
    Weight,
    compressed,
    dot,
    materialize,
    nbytes,
    refine,
    rows,
    shape,
    size,
)
from jaxllm.core.weights.clipped import Clipped
from jaxllm.core.weights.codebook import Codebook
from jaxllm.core.weights.entropy import EntropyCoded
from jaxllm.core.weights.gated import Gated
from jaxllm.core.weights.kronecker import Kronecker
from jaxllm.core.weights.lattice import Lattice
from jaxllm.core.weights.lowrank import LowRank, Sum, Trainable, merge
from jaxllm.core.weights.mpo import MPO
from jaxllm.core.weights.planes import Planes
from jaxllm.core.weights.quantized import Quantized
from jaxllm.core.weights.reassembly import Reassembly
from jaxllm.core.weights.rowgroups import RowGroups, Transposed
from jaxllm.core.weights.scattered import Scattered
from jaxllm.core.weights.segmented import Segmented
from jaxllm.core.weights.signed import Signed
from jaxllm.core.weights.sparse import Sparse
from jaxllm.core.weights.transformed import (
    Flip,
    Hadamard,
    Orthogonal,
    OutputTransformed,
    PerHead,
    Permutation,
    Scale,
    Transformed,
)
from jaxllm.core.weights.two_level import TwoLevel
from jaxllm.core.weights.vectors import Vectors

__all__ = [
    "MPO",
    "ActivationQuantized",
    "Clipped",
    "Codebook",
    "EntropyCoded",
    "Flip",
    "Gated",
    "Hadamard",
    "Kronecker",
    "Lattice",
    "LowRank",
    "Orthogonal",
    "OutputTransformed",
    "PerHead",
    "Permutation",
    "Planes",
    "Quantized",
    "Reassembly",
    "RowGroups",
    "Scale",
    "Scattered",
    "Segmented",
    "Signed",
    "Sparse",
    "StaticInput",
    "Sum",
    "Trainable",
    "Transformed",
    "Transposed",
    "TwoLevel",
    "Vectors",
    "Weight",
    "compressed",
    "dot",
    "materialize",
    "merge",
    "nbytes",
    "refine",
    "rows",
    "shape",
    "size",
]
