"""Every case of every op: right, how fast, how near to the ceiling, beside its peers.

    python experiments/kernels/run.py [--only llama3-8b/down] [--out results.json]

On a GPU or TPU: each case against float64 on fresh inputs, its device time, bytes and
operations a second as shares of this device's measured copy bandwidth and bfloat16
matmul, and the peers that are installed. On a CPU: the tiny cases only, so that the
program itself can be tested. Cases not reached within ``--minutes`` are listed as such.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import peers
import timing
import truth

import pallas_kernels
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.render import rewrite
from pallas_kernels import tuning

HERE = Path(__file__).resolve().parent


def chosen(platform: str, only: str) -> list[tuple]:
    """(op, case) to run here: the tiny ones on a CPU, the real ones elsewhere."""
    tiny = platform == "cpu"
    return [
        (op, case)
        for op in pallas_kernels.ops().values()
        for case in op.cases
        if case.tiny == tiny and only in f"{op.name}/{case.name}"
    ]


def kernel(op, case, platform: str):
    """The platform's kernel as a function of arrays; a CPU may use the reference."""
    if platform == "cpu" and platform not in op.kernels:
        return lambda *arguments: op.reference(*arguments, **case.options)
    return lambda *arguments: op.on(platform, *arguments, **case.options)


def prepare(op, case, platform: str):
    """(call, program over all sets, sets), or why the platform has no kernel."""
    count = timing.set_count(case.shapes)
    try:
        run = kernel(op, case, platform)
        once = jax.jit(run).lower(*case.shapes).compile()
        if platform == "cpu":
            return once, None, count
        return once, timing.compiled(run, case.shapes, count), count
    except NotImplementedError as reason:
        return str(reason)


def measure(op, case, made, ceilings: dict, seed: int) -> dict:
    """One row: error, time, rates and shares of the ceilings."""
    once, program, count = made
    keys = jax.random.split(jax.random.key(seed), count)
    sets = [case.make(key) for key in keys]
    result = once(*sets[0])
    row = truth.error(op, case, sets[0], result, seed)
    if row["error"] is not None:
        row["within_tolerance"] = row["error"] <= case.tolerance
    if program is None:
        took = timing.seconds_by_call(once, sets)
    else:
        took = timing.seconds(program, sets)
    moved = timing.nbytes(case.shapes) + timing.nbytes(result)
    row |= {"seconds": took, "bytes": moved, "flops": case.flops, "input_sets": count}
    rates = {"bytes_per_second": moved / took, "flops_per_second": case.flops / took}
    shares = {f"share_of_{k}": rates[k] / ceilings[k] for k in rates}
    # Nothing that reads its inputs beats a copy: such a time is not to be believed.
    believable = shares["share_of_bytes_per_second"] <= 1.1
    row |= rates | shares | {"believable": believable}
    return row


def ceilings(platform: str) -> dict[str, float]:
    """This device's copy bandwidth and bfloat16 matmul, measured now."""
    small = platform == "cpu"
    return {
        "bytes_per_second": timing.copy_bandwidth(2**22 if small else 2**30),
        "flops_per_second": timing.matmul_rate(128 if small else 8192),
    }


def rows(platform: str, found: list[tuple], limit: dict, seed: int, until: float):
    """A row for each case; kernels compile ahead in threads."""
    with ThreadPoolExecutor(1 if platform == "cpu" else 8) as pool:
        futures = [pool.submit(prepare, op, case, platform) for op, case in found]
        for (op, case), future in zip(found, futures, strict=True):
            row = {"op": op.name, "case": case.name}
            if time.monotonic() > until:
                future.cancel()
                yield row | {"status": "not reached"}
                continue
            made = future.result()
            if isinstance(made, str):
                yield row | {"status": "unsupported", "reason": made}
                continue
            row |= {"status": "measured"} | measure(op, case, made, limit, seed)
            yield row | {"peers": peers.measure(op.name, case, platform)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of op/case")
    parser.add_argument("--out", type=Path, help="default: results-<device>.json here")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of inputs")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    platform = jax.default_backend()
    found = chosen(platform, options.only)
    if not found:
        parser.error(f"no case on {platform} has {options.only!r} in its name")
    slug = tuning.slug(jax.devices()[0].device_kind)
    path = options.out or HERE / f"results-{slug}.json"
    head = {
        "command": " ".join(["python", "experiments/kernels/run.py", *sys.argv[1:]]),
        "environment": environment(options.seed),
        "peers": peers.versions(),
        "ceilings": ceilings(platform),
    }
    made: list[dict] = []
    for row in rows(platform, found, head["ceilings"], options.seed, until):
        made.append(row)
        print(json.dumps(row), flush=True)
        rewrite(path, json.dumps(head | {"rows": made}, indent=1) + "\n")
    return any(not row.get("within_tolerance", True) for row in made)


if __name__ == "__main__":
    raise SystemExit(main())
