"""Compile every case of every op for a device that is not here.

    python -m pallas_kernels.aot tpu v5e:2x2 [op ...]     # needs the libtpu package
    python -m pallas_kernels.aot cuda h200 [op ...]       # needs the CUDA plugin wheels

``--sample N`` takes N cases of each op, evenly spread, in place of all.
Prints one JSON object a line: op, case, status ("compiled", "unsupported" with the
kernel's reason, or "failed" with the compiler's error), seconds, and the compiler's
memory figures. The exit status counts the failures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import resources

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def target(platform: str, name: str):
    """A compile-only device: ``tpu`` with a topology's name, ``cuda`` with a GPU's."""
    from jax.experimental import topologies

    if platform == "tpu":
        topology = topologies.get_topology_desc(name, platform="tpu")
    elif platform == "cuda":
        described = resources.files("pallas_kernels") / "targets" / f"{name}.txtpb"
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=described.read_text(), topology="1x1x1"
        )
    else:
        raise ValueError(f"platform {platform!r}; accepted: tpu, cuda")
    return topology.devices[0]


def compile_for(device, function, *shapes):
    """``function`` compiled for one compile-only ``device`` (shapes, no values)."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import compat

    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
    )
    tpu = device.platform == "tpu"
    with compat.pretend_tpu(device) if tpu else compat.pretend_gpu():
        return jax.jit(function).lower(*placed).compile()


def results(
    platform: str, name: str, only: tuple[str, ...] = (), sample: int | None = None
) -> Iterator[dict]:
    """One record a case (``sample``: of so many) of each op, or of ``only`` those."""
    import pallas_kernels

    device = target(platform, name)
    kernels = {"tpu": "tpu", "cuda": "gpu"}[platform]
    for op in pallas_kernels.ops().values():
        if (only and op.name not in only) or kernels not in op.kernels:
            continue
        step = max(1, len(op.cases) // (sample or len(op.cases)))
        for case in op.cases[::step][:sample]:
            yield {"op": op.name, "case": case.name, **_attempt(op, case, device)}


def _attempt(op, case, device) -> dict:
    platform = "tpu" if device.platform == "tpu" else "gpu"
    run = lambda *a: op.on(platform, *a, **case.options)  # noqa: E731
    start = time.perf_counter()
    try:
        compiled = compile_for(device, run, *case.shapes)
    except NotImplementedError as reason:
        return {"status": "unsupported", "reason": str(reason)}
    except Exception as error:  # the compiler's own, of many classes
        text = f"{type(error).__name__}: {error}"
        return {"status": "failed", "reason": text[:2000]}
    memory = compiled.memory_analysis()
    return {
        "status": "compiled",
        "seconds": round(time.perf_counter() - start, 2),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "pallas_kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("platform", choices=("tpu", "cuda"))
    parser.add_argument("target", help="v5e:2x2, v5p:2x2x1 ..., or h200")
    parser.add_argument("op", nargs="*")
    parser.add_argument("--sample", type=int)
    given = parser.parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several at a time
    failures = 0
    wanted = given.platform, given.target, tuple(given.op), given.sample
    for record in results(*wanted):
        print(json.dumps(record), flush=True)
        failures += record["status"] == "failed"
    return min(failures, 100)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
