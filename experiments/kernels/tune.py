"""Search tile sizes case by case on this GPU and write pallas_kernels/tuning/<device>.

    python experiments/kernels/tune.py [--only llama3-8b/down] [--minutes 25]

A candidate is kept where its result agrees with the default's and it is at least 3 %
faster; a shape whose default is best gets no entry. The table is rewritten after every
case, so that an interrupted search loses nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import timing

import pallas_kernels
from jaxllm.evaluate.render import rewrite
from pallas_kernels import tuning

GAIN = 0.97  # of the default's time that a candidate must stay below
CODES = "quantized_matmul", "table_matmul"  # their tables tell bits and blocks
BOTH_SUMS = *CODES, "two_level_matmul"  # scales act on sums, or on weights
INTEGERS = "plane_product", "scaled_matmul", "two_level_matmul"
FOLDER = Path(tuning.__file__).parent / "tuning"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A case to tune: its place in the table, its default, and how to run it."""

    table: str
    shape: tuple[int, ...]
    default: object
    run: object
    case: object
    block: int


def subject(op, case) -> Subject | None:
    """What there is to tune about a case, or None."""
    x, options = case.shapes[0], case.options
    rows, inputs = x.shape
    outputs = jax.tree.leaves(case.shapes[1])[0].shape[0]
    block, bits = options.get("block") or inputs, options.get("bits")
    module = sys.modules[f"pallas_kernels.{op.name}.gpu"]
    name, last, kinds = op.name, (block,), ()
    run = getattr(module, op.name)
    if op.name in CODES:
        last = bits, block
        run = lambda *a, **o: getattr(module, name)(*a[:4], **o)  # noqa: E731
    elif op.name == "scaled_matmul":
        name, kinds = f"{op.name}-{x.dtype}", (x.dtype,)
    elif op.name == "plane_product":
        last = (bits,)
    shape = rows, inputs, outputs, *last
    if op.missing("gpu", *case.shapes, **options):
        return None
    default = module.default_tuning(*shape, *kinds)
    return Subject(name, shape, default, run, case, block)


def candidates(of: Subject) -> list:
    """Tunings near the default: tiles, steps, depth, splits, where scales act."""
    start = of.default
    rows = {start.rows, *(r for r in (64, 128, 256) if of.shape[0] >= r)}
    choices = {
        "rows": sorted(rows),
        "inputs": [start.inputs // 2, start.inputs, 2 * start.inputs],
        "stages": sorted({2, 3, 4, 6, 8, start.stages}),
        "splits": [1, 2, 4, 8],
        "warpgroups": [w for w in (1, 2) if of.shape[2] % (64 * w) == 0],
    }
    if of.table in BOTH_SUMS and of.shape[0] <= 64:
        choices["sums"] = [True, False]
    made = [
        dataclasses.replace(start, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]
    return [t for t in made if t == start or _possible(of, t)]


def _possible(of: Subject, t) -> bool:
    """The steps come out even, and shared memory suffices by a rough count."""
    inputs, block = of.shape[1], of.block
    even = t.inputs and inputs % (t.inputs * t.splits) == 0
    aligned = even and (t.inputs % block == 0 or block % t.inputs == 0)
    steps = inputs // (t.inputs * t.splits) if even else 0
    wide = of.case.shapes[0].dtype.itemsize
    stage = t.inputs * (wide * t.rows + 64 * t.warpgroups)
    return aligned and 2 <= t.stages <= steps and t.stages * stage < 220 * 2**10


def search(of: Subject, until: float) -> dict | None:
    """The best tuning's fields, or None where the default stands."""
    count = timing.set_count(of.case.shapes)
    sets = [of.case.make(key) for key in jax.random.split(jax.random.key(0), count)]
    call = lambda t: lambda *a: of.run(*a, **of.case.options, tuning=t)  # noqa: E731
    want = np.asarray(jax.jit(call(of.default))(*sets[0]), np.float32)
    best, fastest = None, GAIN * _seconds(call(of.default), of, count, sets)
    with ThreadPoolExecutor(8) as pool:
        tried = [(t, pool.submit(_program, call(t), of, count)) for t in candidates(of)]
        for t, future in tried:
            if time.monotonic() > until:
                future.cancel()
            elif (program := future.result()) is not None:
                took = timing.seconds(program, sets)
                if took < fastest and _agrees(call(t), sets[0], want):
                    best, fastest = t, took
    return None if best is None else dataclasses.asdict(best)


def _program(function, of: Subject, count: int):
    """Compiled, or None where the compiler finds the tiles impossible."""
    try:
        return timing.compiled(function, of.case.shapes, count)
    except (NotImplementedError, ValueError, RuntimeError):
        return None


def _seconds(function, of: Subject, count: int, sets) -> float:
    return timing.seconds(timing.compiled(function, of.case.shapes, count), sets)


def _agrees(function, arguments, want) -> bool:
    got = np.asarray(jax.jit(function)(*arguments), np.float32)
    return np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


def write(path: Path, table: dict) -> None:
    tuning.validate(table, path.name)
    rewrite(path, json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of op/case")
    parser.add_argument("--minutes", type=float, default=25)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"tunes Hopper kernels; this is {jax.default_backend()}")
    path = FOLDER / f"{tuning.slug(jax.devices()[0].device_kind)}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    until = time.monotonic() + 60 * options.minutes
    for name in (*CODES, *INTEGERS):
        op = pallas_kernels.ops()[name]
        for case in op.cases:
            if case.tiny or options.only not in f"{name}/{case.name}":
                continue
            of = subject(op, case)
            if of is None or time.monotonic() > until:
                continue
            entries = table.setdefault(of.table, {})
            entries.pop(tuning.key(of.shape), None)
            if fields := search(of, until):
                entries[tuning.key(of.shape)] = fields
            print(case.name, fields or "default", flush=True)
            write(path, table)


if __name__ == "__main__":
    main()
