"""What the TPU compiler schedules for the named cases below, without a TPU.

    python experiments/kernels/static.py [--only v6e] [--out static.json]

Needs the libtpu package. Each case is compiled in its own process for each topology
and its figures (``pallas_kernels.tpu_static``) go to the JSON file and a table beside
it. ``--only`` takes the rows whose "chip op case" has that text and keeps the others
as they stand in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import jax

import pallas_kernels
from jaxllm.evaluate.environment import environment
from jaxllm.evaluate.render import rewrite
from pallas_kernels import aot, compat, quantized_matmul, tpu_static
from pallas_kernels.shapes import LLAMA3_8B

HERE = Path(__file__).resolve().parent
CAVEAT = "static figures of the compiler's schedule, not measurements"
SYMMETRIC = quantized_matmul.cases.case(LLAMA3_8B[2], 2048, 4)
CASES = (
    ("quantized_matmul", SYMMETRIC.name),
    ("quantized_matmul", "llama3-8b/gate_up/w4-g128-asym/m2048"),
    ("quantized_matmul", "qwen2.5-7b/down/w4-g128-asym/m2048"),
    ("quantized_matmul", "llama3-8b/gate_up/w4-g128-asym/m256"),
    ("quantized_matmul", "llama3-8b/gate_up/w4-g128-asym/m16"),
    ("scaled_matmul", "llama3-8b/gate_up/int8-channel/m2048"),
    ("scaled_matmul", "llama3-8b/gate_up/fp8-channel/m2048"),
    ("two_level_matmul", "llama3-8b/gate_up/w4a8-g128-asym/m2048"),
    ("two_level_matmul", "llama3-8b/gate_up/w4a8-g128-asym/m16"),
    ("nm_matmul", "llama3-8b/gate_up/2of4-float/m1"),
    ("nm_matmul", "llama3-8b/gate_up/2of4-w4-g128/m1"),
    ("scattered_matmul", "llama3-8b/down/1.00%/m1"),
    ("scattered_matmul", "llama3-8b/down/1.00%/m16"),
    ("scattered_matmul", "llama3-8b/down/1.00%/m2048"),
)
# Hz: the peak of a TensorCore over what its matrix units do in a cycle (v6e: two rows
# at a time). Not published for tpu7x: no times there.
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


def found_case(op: str, name: str):
    """The op's case of that name, or the symmetric one that no test needs."""
    cases = (*pallas_kernels.ops()[op].cases, SYMMETRIC)
    return next(case for case in cases if case.name == name)


def bytes_moved(op: str, case) -> int:
    """Of the arguments and the result, once."""
    reference = pallas_kernels.ops()[op].reference
    result = jax.eval_shape(lambda *a: reference(*a, **case.options), *case.shapes)
    leaves = jax.tree.leaves((case.shapes, result))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)


def chip_info(topology: str):
    """What Pallas knows about one TensorCore of the chip."""
    from jax.experimental.pallas import tpu as pltpu

    with compat.pretend_tpu(aot.target("tpu", topology)):
        return pltpu.get_tpu_info()


def rates(case, info) -> float:
    """Operations a second of the chip's peak for what the case multiplies."""
    kind = case.shapes[0].dtype
    if kind.itemsize > 1:
        return info.bf16_ops_per_second
    return info.int8_ops_per_second if kind == "int8" else info.fp8_ops_per_second


def row(topology: str, op: str, name: str) -> dict:
    """The figures of one case for one chip."""
    command = [sys.executable, __file__, "--compile", topology, op, name]
    case, chip = found_case(op, name), topology.partition(":")[0]
    moved = bytes_moved(op, case)
    figures = {"chip": chip, "op": op, "case": name, "bytes": moved}
    figures |= tpu_static.scheduled(command)
    if chip in CLOCK and "kernels" in figures and counted(figures):
        info = chip_info(topology)
        seconds = sum(map(all_bundles, steps(figures))) / CLOCK[chip]
        memory = moved / info.mem_bw_bytes_per_second
        figures["bundles_over_memory"] = round(seconds / memory, 2)
        if peak := rates(case, info):
            figures["useful"] = round(case.flops / peak / seconds, 3)
    return figures


def steps(entry: dict) -> list[dict]:
    """The Pallas kernels of a row, which have an average step."""
    return [kernel for kernel in entry["kernels"].values() if "step" in kernel]


def counted(entry: dict) -> bool:
    """No loop of its kernels ends by data."""
    return not any(kernel["open"] for kernel in steps(entry))


def all_bundles(kernel: dict) -> int:
    return kernel["step"]["bundles"] * math.prod(kernel["grid"])


def line(entry: dict) -> str:
    """A row of the table: the Pallas kernel with the most bundles speaks for a case."""
    start = f"| {entry['op']} | {entry['case']} | {entry['chip']} | "
    if "failed" in entry:
        last = entry["failed"].strip().splitlines()[-1]
        return start + f"not compiled: {last[:100]} | | | | | | |"
    kernel = max(steps(entry), key=all_bundles)
    hot, step = kernel["hot"], kernel["step"]
    spills = [f"{k['VSTORE:SPILL']} / {k['VLOAD:FILL']}" for k in (hot, step)]
    return start + " | ".join(
        [
            f"{hot['MXU']:.0%}",
            f"{step['MXU']:.0%}",
            f"{entry['useful']:.0%}" if "useful" in entry else "-",
            *spills,
            f"{entry['bytes'] / 1e6:.1f}",
            str(entry.get("bundles_over_memory", "-")) + " |",
        ]
    )


def table(report: dict) -> str:
    """The rows as Markdown, below what they are."""
    about = report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return "\n".join(
        [
            "# Static figures of the TPU kernels",
            "",
            f"These are {CAVEAT}. Generated by `python experiments/kernels/static.py`:",
            f"{versions}; the JSON has the commit of each row.",
            "",
            "Hot: the loop that keeps the matrix unit busiest. Step: an average one of",
            "the grid. Spills are stores / loads in the code, however often they run.",
            "Useful: the time of the case's operations at peak over that of the Pallas",
            "kernels' bundles (above 100 %: the units will be waited for). The last",
            "column divides the latter by the time of reading and writing each byte",
            "once: below 1, memory decides. Neither is known if a loop ends by data.",
            "",
            "| op | case | chip | matrix slots, hot | step | useful | spills, hot "
            "| step | MB moved | bundles over memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(line, report["rows"]),
            "",
        ]
    )


def libtpu() -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--compile"]:
        topology, op, name = arguments[1:]
        found = tpu_static.compile_case(topology, op, found_case(op, name))
        print(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser("static.py", description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=HERE / "static.json")
    given = parser.parse_args(arguments)
    wanted = [(t, op, name) for op, name in CASES for t in aot.TOPOLOGIES]
    text = lambda t, op, name: f"{t.partition(':')[0]} {op} {name}"  # noqa: E731
    kept = {}
    if given.only and given.out.exists():
        rows = json.loads(given.out.read_text())["rows"]
        kept = {text(r["chip"], r["op"], r["case"]): r for r in rows}
    report = {"what": CAVEAT, "environment": environment()}
    report["environment"]["versions"]["libtpu"] = libtpu()
    for each in wanted:
        if given.only in text(*each):
            made_by = {"commit": report["environment"]["commit"]}
            kept[text(*each)] = made_by | row(*each)
            print(line(kept[text(*each)]), flush=True)
        order = [text(*each) for each in wanted]
        report["rows"] = [kept[name] for name in order if name in kept]
        rewrite(given.out, json.dumps(report, indent=1) + "\n")
        rewrite(given.out.with_suffix(".md"), table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
