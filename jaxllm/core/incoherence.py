"""Incoherence processing: weights turned until no entry stands out, then a lattice."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core import metrics
from jaxllm.core.lattice import LENGTH, nearest_code, points
from jaxllm.core.spec import expression
from jaxllm.core.sweep import upper_factor
from jaxllm.core.vectors import sweep_vectors
from jaxllm.core.weights import Flip, Hadamard, Lattice, OutputTransformed, Transformed

# Bits of each stage's codes, and by how much a stage's numbers exceed the first's.
SPREADS = {2: 1.03, 3: 0.98, 4: 1.03}
STAGES = {2: ((16, 1.0),), 3: ((16, 1.0), (8, 2.04)), 4: ((16, 1.0), (16, 3.45))}


@expression
def incoherent(solve):
    """Another solver between random Hadamard transforms of inputs and outputs.

    W = S_u H_u W' H_v S_v with random signs S. Both sides stay online and are
    orthogonal, so that errors keep their size, while the largest |W'_ij| comes down to
    the order of |W|_F sqrt(log(mn) / mn) (QuIP#, arXiv:2402.04396, lemma 3.1).
    """

    def turned(w, stats, key=None, support=None):
        if support is not None:
            raise TypeError("a rotated weight cannot keep a sparse support")
        key = jax.random.key(0) if key is None else key
        first, second, rest = jax.random.split(key, 3)
        before = Flip.random(first, len(w)), Hadamard()
        after = Hadamard(), Flip.random(second, w.shape[1])
        inside = w.astype(jnp.float32)
        for op in before:
            inside = op.apply(inside.T).T
            stats = None if stats is None else stats.through(op)
        for op in reversed(after):
            inside = op.inverse(inside)
        made = solve(inside.astype(w.dtype), stats, rest)
        for op in reversed(before):
            made = Transformed(op, made)
        for op in after:
            made = OutputTransformed(op, made)
        return made

    return turned


@expression
def lattice(bits: int = 2, metric=metrics.gram(), spread: float | None = None):
    """Eight inputs of an output at a time to the nearest point of E8, with LDLQ.

    W is scaled to the root mean square ``spread`` of the codebook's units (None: the
    authors' 1.03, or 0.98 for 3 bits); each block
    of eight inputs is rounded together, and later inputs absorb its error (QuIP#,
    section 4). 2 bits are E8P; 3 and 4 bits round what is left by short points of E8
    or E8P again, enlarged by 2.04 and 3.45 (the authors' constants).
    """
    spread = SPREADS.get(bits, 1.0) if spread is None else spread
    if bits not in STAGES or spread <= 0:
        accepted = ", ".join(map(str, STAGES))
        raise ValueError(f"bits {bits}, spread {spread}; accepted: {accepted}, above 0")

    def solve(w, stats, key=None, support=None) -> Lattice:
        if support is not None:
            raise TypeError("points of a lattice cannot keep a sparse support")
        dense = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.sqrt((dense**2).mean()) / spread, 1e-12)
        filled = jnp.pad(dense / scale, ((0, -len(w) % LENGTH), (0, 0)))
        u = upper_factor(metric(stats, len(w)).full())
        assign = lambda i, rows: _staged(rows, STAGES[bits])  # noqa: E731
        codes = sweep_vectors(filled, u, LENGTH, assign)
        codes = tuple(c.T for c in codes)
        scales = jnp.stack([scale / gain for _, gain in STAGES[bits]])
        return Lattice(codes, scales, len(w), str(w.dtype))

    return solve


def _staged(rows, stages):
    """(one code per stage, their sum) for vectors [out, 8]."""
    codes, rest = [], rows
    for bits, gain in stages:
        code = nearest_code(rest * gain, bits)
        codes.append(code)
        rest = rest - points(code) / gain
    return tuple(codes), rows - rest
