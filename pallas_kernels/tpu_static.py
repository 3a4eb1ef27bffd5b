"""What the TPU compiler scheduled: slots filled and spills of an op's cases.

    python -m pallas_kernels.tpu_static v5e:2x2 OP [part of a case's name ...]

Needs the libtpu package and no TPU. Prints one JSON object a case and program: the
bundles of the kernel, the share of matrix-unit and vector slots that they fill, and
register spills. Static figures: loops count once, memory is not waited for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
TABLES = "*-static-per-bundle-utilization.txt"


def slots(table: str) -> dict:
    """Totals of one per-bundle table: share of each unit's slots, spills as counts."""
    lines = table.splitlines()
    columns = [name.strip() for name in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    totals = [sum(column) for column in zip(*rows, strict=True)]
    found: dict = {"bundles": len(rows)}
    for name, total, most in zip(columns, totals, capacity, strict=True):
        counted = "SPILL" in name or "FILL" in name
        found[name] = total if counted else round(total / (most * len(rows)), 3)
    return found


def case_figures(topology: str, op: str, case: str) -> dict:
    """Compile one case in its own process, dumping the schedule; the figures."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "LIBTPU_INIT_ARGS": DUMP.format(folder),
        }
        run = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--compile", topology, op, case],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if run.returncode:
            return {"case": case, "failed": run.stderr[-1500:]}
        kernels = {
            match[1]: slots(file.read_text())
            for file in Path(folder).glob(TABLES)
            if (match := re.match(r"\d+-(\w+)(?:\.\d+)?-\d+-final_hlo", file.name))
        }
    return {"topology": topology, "case": case, "kernels": kernels}


def compile_case(topology: str, op_name: str, case_name: str) -> None:
    import pallas_kernels
    from pallas_kernels import aot

    op = pallas_kernels.ops()[op_name]
    case = next(c for c in op.cases if c.name == case_name)
    device = aot.target("tpu", topology)
    run = lambda *a: op.on("tpu", *a, **case.options)  # noqa: E731
    aot.compile_for(device, run, *case.shapes)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments[0] == "--compile":
        compile_case(*arguments[1:])
        return 0
    import pallas_kernels

    topology, name, *wanted = arguments
    for case in pallas_kernels.ops()[name].cases:
        if not case.tiny and all(part in case.name for part in wanted):
            print(json.dumps(case_figures(topology, name, case.name)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
