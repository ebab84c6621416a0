"""The facts that stand beside a number: machine, kernel, file system, versions, load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path


def file_system(folder: Path) -> str:
    """Return the type of the file system that `folder` is on, such as ext4."""
    path = str(folder.resolve())
    best, found = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        point = mount.split()[4].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # A later line covers an earlier one at the same place.
        if inside and len(point) >= len(best):
            best, found = point, source.split()[0]
    return found


def cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"


def memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / (1 << 30):.0f} GiB"


def version(argv: list[str]) -> str:
    """Return the version number in the first line that a command prints, or "?"."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    number = re.search(r"\d+(\.\d+)+\S*", done.stdout + done.stderr)
    return number[0] if number else "?"


def load() -> float:
    """Return how many processes wanted to run, on average over the last minute."""
    return os.getloadavg()[0]


def facts(commands: dict[str, list[str]], folder: Path) -> dict[str, str]:
    """Return name and value of each fact; `commands` prints the versions of the tools in use."""
    versions = ", ".join(f"{name} {version(argv)}" for name, argv in commands.items())
    return {
        "machine": f"{cpu_model()}, {memory()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": file_system(folder),
        "versions": f"{versions}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "load before": f"{load():.2f}",
    }
