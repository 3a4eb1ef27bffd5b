"""What the TPU compiler scheduled: slots filled and spills of an op's cases.

    python -m pallas_kernels.tpu_static v5e:2x2 OP [part of a case's name ...]

Needs the libtpu package and no TPU. Prints one JSON object a case: for each program
the bundles, the share of matrix-unit and vector slots that they fill, and register
spills; of a Pallas kernel also ``hot``, the loop that keeps the matrix unit busiest,
and ``step``, an average step of the grid: inner loops count as often as they turn, and
what runs in some steps alone (the first, the last) counts once in the grid's last
axis; ``open`` tells of a loop that ends by data, which counts as one turn. Static
figures of the compiler's schedule, not measurements: memory is not waited for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
TABLES = "*final_hlo-static-per-bundle-utilization.txt"
NAME = re.compile(r"(\d+-(?P<kernel>\w+?)(?:\.\d+)?)-\d+-final_hlo-")
# An address, perhaps the kind of target that it is, one ">" for each loop around it.
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?P<target>[A-Z]{2})?\s*: (?P<in>[> ]*){")
BRANCH = re.compile(r"sbr\.rel (?:\(!?(?P<if>%p\w+)\) )?target = \$region(?P<to>\d+)")
TURNS = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder %\w+, (\d+)")
LANDING = re.compile(r"empty region (\d+)")
START = re.compile(r"Start region (\d+)")
DELAY = 4  # bundles after a branch that still belong to it


@dataclasses.dataclass
class Table:
    """Slots of each unit in a bundle, and those that each bundle fills."""

    units: list[str]
    capacity: list[int]
    rows: list[list[int]]

    @classmethod
    def read(cls, text: str) -> Table:
        lines = text.splitlines()
        return cls(
            [name.strip() for name in lines[1].split(",")],
            [int(n) for n in lines[2].split()],
            [[int(n) for n in line.split()] for line in lines[4:] if line.strip()],
        )

    def filled(self, part: Stretch, unit: int) -> int:
        """Slots of a unit that a stretch fills."""
        return sum(self.rows[bundle][unit] for bundle in part.bundles)


@dataclasses.dataclass
class Stretch:
    """Bundles that run one after another: ``loops`` deep, ``turns`` times a step."""

    first: int
    loops: int
    head: int  # first bundle of the inner loop around it, or its own
    count: int = 0
    turns: float = 1
    open: bool = False  # the loop ends by data: one turn stands for it

    @property
    def bundles(self) -> range:
        return range(self.first, self.first + self.count)


def stretches(text: str) -> tuple[list[Stretch], list[range]]:
    """The final bundles of a program, cut at branches; what branches jump over.

    All from the head of an inner loop to the branch back belongs to it: the compiler
    may mark a bundle within that also serves what follows as one outside.
    """
    found: list[Stretch] = []
    jumps: dict[str, int] = {}  # by the region that a branch ahead leads to
    skipped: list[range] = []
    limits: dict[str, int] = {}
    started: set[str] = set()
    around: list[Stretch] = []  # heads of the inner loops that have not ended
    left, back = -1, False
    bundles = (match for line in text.splitlines() if (match := BUNDLE.match(line)))
    for bundle, match in enumerate(bundles):
        line, loops = match.string, match["in"].count(">")
        if back and (not left or match["target"]):
            around.pop()
            back = False
        head = match["target"] == "LB" and loops > 1
        if around and not head:
            loops = max(loops, around[-1].loops)
        if not found or not left or match["target"] or loops != found[-1].loops:
            inner = around and not head
            found.append(Stretch(bundle, loops, around[-1].head if inner else bundle))
            left = -1
        if head:
            around.append(found[-1])
        for region in LANDING.findall(line):
            if region in jumps:
                skipped.append(range(jumps.pop(region), bundle))
        started.update(START.findall(line))
        limits |= {name: int(limit) for name, limit in TURNS.findall(line)}
        left -= left > 0
        if branch := BRANCH.search(line):
            left = DELAY
            jumps[branch["to"]] = bundle
            turns = limits.get(branch["if"])
            back = bool(around) and (turns is not None or branch["to"] in started)
            if back:
                for part in found:
                    if part.first >= around[-1].first:
                        part.turns *= turns or 1
                        part.open |= turns is None
        found[-1].count += 1
    return found, skipped


def slots(table: Table, parts: list[Stretch]) -> dict:
    """Share of each unit's slots over ``parts`` as often as they turn; spills once."""
    bundles = sum(part.count * part.turns for part in parts)
    found: dict = {"bundles": round(bundles)}
    for i, (name, most) in enumerate(zip(table.units, table.capacity, strict=True)):
        if "SPILL" in name or "FILL" in name:
            found[name] = sum(table.filled(part, i) for part in parts)
        else:
            filled = sum(table.filled(part, i) * part.turns for part in parts)
            found[name] = round(filled / max(1, most * bundles), 3)
    return found


def figures(table: Table, bundles: str, grid: tuple[int, ...] = ()) -> dict:
    """Of a whole program; of a kernel's average step and busiest stretch too."""
    found = slots(table, [Stretch(0, 0, 0, len(table.rows))])
    if not grid:
        return found
    parts, skipped = stretches(bundles)
    parts = [part for part in parts if part.loops]
    unit = table.units.index("MXU")
    around = {p.first: sum(p.first in jump for jump in skipped) for p in parts}
    least = min((around[p.first] for p in parts if table.filled(p, unit)), default=0)

    def work(part: Stretch) -> float:
        """Of the matrix unit in an average step: further jumps pass it in most."""
        deeper = max(0, around[part.first] - least)
        return part.turns * table.filled(part, unit) / grid[-1] ** deeper

    top = max(parts, key=lambda part: (work(part), part.count))
    rare = [jump for jump in skipped if top.first not in jump]
    for part in parts:
        if any(part.first in jump for jump in rare):
            part.turns /= grid[-1]
    hot = [part for part in parts if part.head == top.head]
    return {
        **found,
        "grid": grid,
        "step": slots(table, parts),
        "hot": slots(table, hot),
        "open": any(part.open for part in parts),
    }


def case_figures(topology: str, op: str, case: str) -> dict:
    """Compile one case in its own process, dumping the schedule; the figures."""
    command = [sys.executable, "-m", __spec__.name, "--compile", topology, op, case]
    return {"topology": topology, "case": case, **scheduled(command)}


def scheduled(command: list[str]) -> dict:
    """Figures by kernel of what a command compiles for a TPU, or how it failed.

    The command prints the grids of its Pallas kernels by name, as ``compile_case``.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several at a time
            "LIBTPU_INIT_ARGS": DUMP.format(folder),
        }
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}
        )
        if run.returncode:
            return {"failed": run.stderr[-1500:]}
        return {"kernels": kernels(Path(folder), json.loads(run.stdout))}


def kernels(folder: Path, grids: dict) -> dict:
    """Figures of each program whose schedule was dumped to ``folder``."""
    found = {}
    for file in sorted(folder.glob(TABLES)):
        if not (match := NAME.match(file.name)):
            continue
        (bundles,) = folder.glob(f"{match[1]}-[0-9]*[0-9]-final_bundles.txt")
        table, name = Table.read(file.read_text()), match["kernel"]
        found[name] = figures(table, bundles.read_text(), grids.get(name, ()))
    return found


def compile_case(topology: str, op: str, case) -> dict:
    """Compile one case for a TPU; the grids of its Pallas kernels by name."""
    import jax

    import pallas_kernels
    from pallas_kernels import aot, compat

    device = aot.target("tpu", topology)
    run = lambda *a: pallas_kernels.ops()[op].on("tpu", *a, **case.options)  # noqa: E731
    aot.compile_for(device, run, *case.shapes)
    with compat.pretend_tpu(device):
        return grids(jax.make_jaxpr(run)(*case.shapes).jaxpr)


def grids(jaxpr) -> dict:
    """The grid of each named Pallas call within."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            name = equation.params["name"]
            found[name] = equation.params["grid_mapping"].grid
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # a closed one holds it
            if hasattr(inner, "eqns"):
                found |= grids(inner)
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    import pallas_kernels

    if arguments[0] == "--compile":
        topology, name, wanted = arguments[1:]
        case = next(c for c in pallas_kernels.ops()[name].cases if c.name == wanted)
        print(json.dumps(compile_case(topology, name, case)))
        return 0
    topology, name, *wanted = arguments
    for case in pallas_kernels.ops()[name].cases:
        if not case.tiny and all(part in case.name for part in wanted):
            print(json.dumps(case_figures(topology, name, case.name)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
