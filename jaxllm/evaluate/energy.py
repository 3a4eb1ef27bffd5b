"""Energy of a computation, where this machine has a meter."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclasses.dataclass(frozen=True)
class Energy:
    """Joules and their meter; None with the reason where there is no meter."""

    joules: float | None
    source: str

    def per(self, count: int) -> float | None:
        """Joules of each of ``count`` items, or None."""
        return None if self.joules is None else self.joules / count


def measure(run: Callable[[], object], powercap: Path = POWERCAP) -> Energy:
    """Energy of the machine while ``run`` runs (all that runs there at that time).

    Intel's RAPL counters where they can be read, else the power that ``nvidia-smi``
    shows at the end, times the duration: an estimate.
    """
    counters = _rapl(powercap)
    if counters:
        before = [int((c / "energy_uj").read_text()) for c in counters]
        run()
        spent = [_spent(c, b) for c, b in zip(counters, before, strict=True)]
        return Energy(sum(spent) / 1e6, "RAPL counters of the processor packages")
    if shutil.which("nvidia-smi"):
        start = time.perf_counter()
        run()
        watts = _nvidia_watts()
        if watts is not None:
            seconds = time.perf_counter() - start
            return Energy(watts * seconds, "nvidia-smi power draw times duration")
        return Energy(None, "no meter: nvidia-smi shows no power draw")
    run()
    return Energy(None, "no meter: RAPL counters are not readable, no nvidia-smi")


def _rapl(powercap: Path) -> list[Path]:
    """Package counters (``intel-rapl:0``); their parts are within them."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        try:
            int((folder / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
        if folder.name.count(":") == 1:
            found.append(folder)
    return found


def _spent(counter: Path, before: int) -> int:
    """Microjoules since ``before``; the counter starts again at its range."""
    now = int((counter / "energy_uj").read_text())
    if now >= before:
        return now - before
    return now - before + int((counter / "max_energy_range_uj").read_text())


def _nvidia_watts() -> float | None:
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
        return sum(float(line) for line in text.split("\n") if line.strip())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
