"""What is measured without a client's load: how long a start takes, what an idle connection costs.

These start and end their servers themselves, again and again; so they run all servers of a round
at once, and take turns inside.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servers import HERE, SUBJECT, Place
from workloads import KIB, MIB, Sample, WorkloadError

STARTS_PER_SECOND = 5
DISK = 64 * MIB


def timed(argv: Sequence[str]) -> tuple[float, float]:
    """Run a command to its end; return wall seconds and CPU seconds, its children's too.

    Raises WorkloadError when it fails.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise WorkloadError(f"{argv[0]} ended with status {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Start:
    """From nothing to a command that has run: `pynbdkit -U - memory 1M --run true`, and no more.

    The servers take turns at each start; the median counts. "python" is a bare interpreter, the one
    that pynbdkit runs in (or that runs this).
    """

    name: str = "run-true"
    unit: str = "ms"

    def run_all(self, names: Sequence[str], place: Place, seconds: float) -> dict[str, Sample]:
        commands = {name: self.command(name, place) for name in names}
        for argv in commands.values():  # whatever is read from disk, or compiled, at the first
            timed(argv)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(max(3, round(seconds * STARTS_PER_SECOND))):
            for name, argv in commands.items():
                times[name].append(timed(argv))
        samples = {}
        for name, pairs in times.items():
            wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            samples[name] = Sample(len(pairs), len(pairs) * wall, 0, len(pairs) * cpu)
        return samples

    @staticmethod
    def command(name: str, place: Place) -> list[str]:
        """Return what is started for one of the names."""
        if name == "python":
            return [sys.executable, "-c", "pass"]
        start = list(place.pynbdkit) if name == SUBJECT else ["nbdkit"]
        return [*start, "-U", "-", "memory", "1M", "--run", "true"]


@dataclass(frozen=True)
class Idle:
    """What an idle connection costs in resident memory, as `make load` measures it."""

    name: str = "idle-connection"
    unit: str = "KiB"
    connections: int = 200

    def run_all(self, names: Sequence[str], place: Place, seconds: float) -> dict[str, Sample]:
        campaigns = str(HERE.parent / "campaigns")
        if campaigns not in sys.path:
            sys.path.append(campaigns)
        import crowd
        import load
        from subject import Subject, SubjectError

        crowd.descriptor_limit(self.connections + 100)
        samples = {}
        for name in names:
            command = list(place.pynbdkit) if name == SUBJECT else ["nbdkit"]
            words = ("memory", str(DISK))
            try:
                with (
                    tempfile.TemporaryDirectory(prefix="nbd-") as folder,
                    Subject(Path(folder), words, command=command) as server,
                ):
                    crowd.churn(server.address, (crowd.IDLE,), 20)
                    server.quiet()
                    before, during = load.idle_connection(server, self.connections)
            except (SubjectError, OSError, EOFError) as error:
                raise WorkloadError(f"{name}: {error}") from None
            nbytes = during.rss - before.rss
            if nbytes < KIB:
                raise WorkloadError(f"{name}: {self.connections} connections cost {nbytes} bytes")
            samples[name] = Sample(self.connections, 1.0, nbytes, 0.0)
        return samples


Together = Start | Idle
"""A row for which a round runs all servers at once."""
WORKLOADS: dict[str, Together] = {"idle": Idle(), "start": Start()}
"""The one row of each of these kinds."""
