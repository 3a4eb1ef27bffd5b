"""What must stand beside a number: command, commit, device, versions, seed."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "numpy")


def environment(seed: int | None = None) -> dict[str, Any]:
    """The surroundings of a measurement, as JSON data."""
    device = jax.devices()[0]
    script, *arguments = sys.argv or [""]
    return {
        "command": shlex.join([Path(script).name, *arguments]),
        "commit": _commit(),
        "device": f"{device.device_kind} x {jax.device_count()} ({device.platform})",
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {"python": platform.python_version()} | _versions(),
        "seed": seed,
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None  # a source tree that is not installed

    return {package: version(package) for package in PACKAGES}


def _commit() -> str | None:
    """The commit of this package's source tree, where it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
