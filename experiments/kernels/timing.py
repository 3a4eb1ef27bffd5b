"""Device time of a function: many calls in one program, on several input sets.

Dispatch from Python costs more than a small kernel. So one program calls the function
once per input set, again and again, each call waiting for the one before; the time per
call is the slope between a short and a long run, in which launches and the loop's entry
cancel. Several sets, larger than the cache together, keep weights from staying in it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CACHE = 64 * 2**20  # bytes: more than the L2 of one H100 or H200
SETS = (4, 8)  # fewest and most input sets


def nbytes(tree) -> int:
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def set_count(arguments) -> int:
    """Input sets that exceed the cache four times over, within ``SETS``."""
    fewest, most = SETS
    return min(most, max(fewest, -(-4 * CACHE // max(1, nbytes(arguments)))))


def repeated(function: Callable) -> Callable:
    """``(sets, repeats, zero) -> outputs`` running ``function`` over all sets in a row.

    ``zero`` is 0.0, but the compiler cannot know: a call's first input depends on the
    last call's result, so that no call leaves the loop and no two run at once. (An
    optimization barrier alone does not do that: on CPUs it goes before loops are
    cleaned, and calls on constant inputs were hoisted.) Work on the other inputs alone,
    such as a dequantized weight, may still be hoisted; kernels read these themselves.
    """
    function = jax.jit(function)  # traced and lowered once for all sets

    def chain(sets, zero, last):
        for arguments in sets:
            arguments, last = lax.optimization_barrier((arguments, last))
            last = function(*_after(last, zero, arguments))
        return last

    def run(sets, repeats, zero):
        first = jax.eval_shape(function, *sets[0])
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        once = functools.partial(chain, sets, zero)
        return lax.fori_loop(0, repeats, lambda _, last: once(last), start)

    return run


def _after(last, zero, arguments):
    """``arguments`` with the first array bound to ``last``, unchanged in value."""
    leaves, tree = jax.tree.flatten(arguments)
    bound = jax.tree.leaves(last)[0].ravel()[0].astype(jnp.float32) * zero
    first = leaves[0].astype(jnp.float32) + bound
    return jax.tree.unflatten(tree, [first.astype(leaves[0].dtype), *leaves[1:]])


def compiled(function: Callable, shapes, count: int):
    """The program of ``repeated`` for ``count`` sets of these shapes."""
    numbers = [jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.float32)]
    return jax.jit(repeated(function)).lower([shapes] * count, *numbers).compile()


def slope(run: Callable[[int], None], calls: int, *, budget: float = 0.2) -> float:
    """Seconds a call of ``run(repeats)``, which makes ``calls`` calls a repeat.

    The long run takes about ``budget`` seconds; the best of three of each counts.
    Should noise leave no slope, the long run as a whole is the (too high) answer.
    """
    run(1)
    repeats = 4
    while (took := _clock(run, repeats)) < budget / 8 and repeats < 2**16:
        repeats *= 4
    long = max(2 * repeats, int(repeats * budget / max(took, 1e-9)))
    short = max(1, long // 4)
    slow, fast = (min(_clock(run, n) for _ in range(3)) for n in (long, short))
    if slow <= fast:
        return slow / (long * calls)
    return (slow - fast) / ((long - short) * calls)


def seconds(program, sets) -> float:
    """Seconds a call of a program made by ``compiled`` on these input sets."""
    zero = jnp.float32(0)
    return slope(
        lambda repeats: jax.block_until_ready(program(sets, jnp.int32(repeats), zero)),
        len(sets),
    )


def seconds_by_call(program, sets) -> float:
    """Seconds a call, dispatched one by one: for CPUs, where that costs little."""

    def run(repeats: int) -> None:
        for _ in range(repeats):
            for arguments in sets:
                jax.block_until_ready(program(*arguments))

    return slope(run, len(sets))


def _clock(run, repeats: int) -> float:
    start = time.perf_counter()
    run(repeats)
    return time.perf_counter() - start


def copy_bandwidth(size: int) -> float:
    """Bytes a second that this device reads and writes in a long copy."""
    shape = jax.ShapeDtypeStruct((size // 4,), jnp.float32)
    program = compiled(lambda a: a + 1, (shape,), 1)
    took = seconds(program, [(jnp.zeros(shape.shape, shape.dtype),)])
    return 2 * size / took


def matmul_rate(width: int) -> float:
    """Operations a second of a square bfloat16 matmul by XLA."""
    shape = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    program = compiled(jnp.matmul, (shape, shape), 1)
    keys = jax.random.split(jax.random.key(0))
    pair = tuple(jax.random.normal(key, shape.shape, shape.dtype) for key in keys)
    return 2 * width**3 / seconds(program, [pair])
