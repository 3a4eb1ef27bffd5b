"""Ranks: how many singular values each weight keeps, under one threshold."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.core.arrays import traced
from jaxllm.core.compose import Context, Pipeline, compress_each
from jaxllm.core.model import Model, get
from jaxllm.core.solvers import svd
from jaxllm.core.spec import expression, marked
from jaxllm.core.weights import compressed


@expression
def tail_ranks(ratio: float):
    """The body that cuts every weight's spectrum at the same height.

    Singular values are divided by the weight's largest; a weight keeps those above one
    threshold, the lowest at which all weights together take the share ``ratio`` of
    the dense parameters. A weight whose factors would not be smaller stays dense
    (WeLore, arXiv:2407.11239, section 3.2). Where only shapes are known all weights
    get the same share.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio}; accepted: 0 < ratio <= 1")

    def run(model: Model, context: Context) -> Model:
        ws = {p: get(model.params, f"{p}.weight") for p in context.paths(model)}
        for path, w in ws.items():
            if compressed(w):
                raise TypeError(f"{path} is {type(w).__name__}: factorize it first")
        spectra = [spectrum(w) for w in ws.values()]
        if traced(spectra):
            each = dict.fromkeys(ws, Pipeline(svd(ratio=ratio)))
        else:
            ranks = ranks_under(spectra, [w.shape[-2:] for w in ws.values()], ratio)
            each = {
                p: Pipeline(None if rank is None else svd(rank=rank))
                for p, rank in zip(ws, ranks, strict=True)
            }
        return compress_each(model, context, each)

    return marked(run, adaptive=True)


def spectrum(w: Float[Array, "*lead in out"]) -> Float[Array, "rank"]:
    """Singular values over the largest; of experts, the largest of each place."""
    found = jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)
    found = found / jnp.maximum(found[..., :1], 1e-30)
    return found.reshape(-1, found.shape[-1]).max(0)


def ranks_under(spectra, shapes, ratio: float) -> list[int | None]:
    """The rank of each weight (None: dense) under the lowest threshold that fits."""
    spectra = [np.asarray(s) for s in spectra]
    budget = ratio * sum(a * b for a, b in shapes)

    def at(threshold) -> list[int | None]:
        ranks = [max(1, int((s >= threshold).sum())) for s in spectra]
        pairs = zip(ranks, shapes, strict=True)
        return [r if r * (a + b) < a * b else None for r, (a, b) in pairs]

    def size(ranks) -> int:
        pairs = zip(ranks, shapes, strict=True)
        return sum(a * b if r is None else r * (a + b) for r, (a, b) in pairs)

    heights = np.unique(np.concatenate(spectra))
    low, high = 0, len(heights) - 1
    if size(at(heights[high])) > budget:
        raise ValueError(f"ratio {ratio} is less than rank one of every weight takes")
    while low < high:  # the size falls as the threshold rises
        middle = (low + high) // 2
        fits = size(at(heights[middle])) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return at(heights[low])
