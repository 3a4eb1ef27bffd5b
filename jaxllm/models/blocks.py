"""From the first block to the last: unrolled, each a program of its own, or scanned."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from jaxllm.core.model import get
from jaxllm.models.layers import Pass


def unrolled(
    config, params, hidden, values: Pass, cache, remat: bool, stepwise: bool = False
):
    """(hidden states, cache) behind all blocks.

    ``stepwise``: equal blocks share a compiled program, which returns to the host.
    """
    new = None if cache is None else dict(cache)
    run = _compiled if stepwise else _run
    for path, block in config.blocks():
        hidden, values = _step(path, block, remat, params, hidden, values, new, run)
    return _whole(hidden, values), new


def _run(block, remat: bool, fixed, params, hidden, *arrays):
    """One block, optionally rematerialised; only arrays cross the checkpoint."""

    def run(params, hidden, positions, segments, weight, cache, tokens):
        here = Pass(positions, segments, cache, fixed[0], weight, fixed[1], tokens)
        return block.apply(params, hidden, here)[0]

    return (jax.checkpoint(run) if remat else run)(params, hidden, *arrays)


_compiled = functools.partial(jax.jit, static_argnums=(0, 1, 2))(_run)


def _apply(block, remat: bool, params, hidden, values: Pass, run=_run):
    v = values
    arrays = v.positions, v.segments, v.weights, v.cache, v.tokens
    return run(block, remat, (v.collect, v.attend), params, hidden, *arrays)


def _step(path, block, remat: bool, params, hidden, values: Pass, cache, run=_run):
    """One block on its own; its entry of ``cache`` is replaced."""
    here = dataclasses.replace(values, cache=None if cache is None else cache.get(path))
    hidden, entry, stream = _apply(block, remat, get(params, path), hidden, here, run)
    if entry is not None:
        cache[path] = entry
    if stream is None:
        return hidden, values
    at = dict(positions=stream.positions, segments=stream.segments)
    return hidden, dataclasses.replace(values, tokens=stream, **at)


def _whole(hidden, values: Pass):
    """A state for every token of the pass."""
    return hidden if values.tokens is None else values.tokens.restored(hidden)


def equal_runs(config, params) -> list[list[str]]:
    """Maximal runs of consecutive layers with equal definition and structure."""

    def structure(item):
        path, block = item
        leaves, tree = jax.tree.flatten(get(params, path))
        alone = path if block.config.tokens else None  # fewer tokens leave it
        return block, tree, tuple((x.shape, x.dtype) for x in leaves), alone

    groups = itertools.groupby(config.blocks(), structure)
    return [[path for path, _ in group] for _, group in groups]


def scanned(config, params, hidden, values: Pass, cache, remat: bool):
    """Like ``unrolled``, each run of equal layers as one scan over stacked leaves."""
    blocks, new = dict(config.blocks()), None if cache is None else dict(cache)
    stack = lambda *xs: jnp.stack(xs)  # noqa: E731
    for run in equal_runs(config, params):
        block = blocks[run[0]]
        if block.config.tokens:
            hidden, values = _step(run[0], block, remat, params, hidden, values, new)
            continue
        stacked = jax.tree.map(stack, *(get(params, p) for p in run))
        entries = [None if cache is None else cache.get(p) for p in run]
        entries = jax.tree.map(stack, *entries) if entries[0] is not None else None

        def step(hidden, layer, block=block, values=values):
            weights_here, entry = layer
            here = dataclasses.replace(values, cache=entry)
            return _apply(block, remat, weights_here, hidden, here)[:2]

        hidden, entries = jax.lax.scan(step, hidden, (stacked, entries))
        if entries is not None:
            for i, path in enumerate(run):
                new[path] = jax.tree.map(lambda x, i=i: x[i], entries)
    return _whole(hidden, values), new
