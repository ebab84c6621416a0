"""How much CPU time a server has used: all its threads, and the children that it forked.

A process's own clock counts its threads, ended ones too, in nanoseconds. Linux lets anybody read
another process's clock by a clock id made from the pid (clock_getcpuclockid(3)). Children
count while they live by their own clock, and once waited for by their parent's `cutime` and
`cstime` in /proc/PID/stat (proc(5)), whose unit is the clock tick, 10 ms as a rule.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
_SCHED_CLOCK = 2  # CPUCLOCK_SCHED in the kernel: the time that the scheduler counted


def parse_stat(text: str) -> tuple[int, float, float]:
    """Answer parent pid, own CPU seconds and those of waited-for children.

    `text` is /proc/PID/stat; the command's name in it may hold spaces and parentheses.
    """
    fields = text.rpartition(")")[2].split()
    utime, stime, cutime, cstime = (int(fields[index]) for index in range(11, 15))
    return int(fields[1]), (utime + stime) * TICK, (cutime + cstime) * TICK


def _stat(pid: int) -> tuple[int, float, float] | None:
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return None  # it ended meanwhile


def children(pid: int) -> set[int]:
    """Return the pids of all living or not yet waited-for descendants of `pid`."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))):
            parents[int(entry)] = stat[0]
    found: set[int] = set()
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown} - found
        found |= grown
    return found


def _own_seconds(pid: int, fallback: float) -> float:
    try:
        return time.clock_gettime((~pid << 3) | _SCHED_CLOCK)
    except OSError:
        return fallback  # a zombie has no clock any more, but still its line in /proc


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that `pid`, its threads and its descendants have used so far.

    Raises ProcessLookupError when there is no such process.
    """
    if _stat(pid) is None:
        raise ProcessLookupError(f"no process {pid}")
    total = 0.0
    for process in {pid} | children(pid):
        if stat := _stat(process):
            total += _own_seconds(process, stat[1]) + stat[2]
    return total


class Stopwatch:
    """The CPU seconds that a server uses between `start` and `stop`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def start(self) -> None:
        self._children = children(self.pid)
        self._begin = cpu_seconds(self.pid)

    def stop(self, patience: float = 2.0) -> float:
        """Return the seconds used since `start`.

        A server that forks per connection may still be ending those children when the client has
        gone: they are waited for, `patience` seconds at most, so that their time is whole.
        """
        deadline = time.monotonic() + patience
        while children(self.pid) - self._children and time.monotonic() < deadline:
            time.sleep(0.005)
        return cpu_seconds(self.pid) - self._begin
