#!/usr/bin/env python3
"""Compare pynbdkit with nbdkit, qemu-nbd and nbd-server on this machine: `make bench`.

The servers of one kind of disk run side by side and take turns: in each round, every workload is
run on each server in turn (A B C, A B C, …), for a moment each, while the others idle. README.md
in this folder says what is measured, and how to read the table.

Exit status: 0 when everything ran, whether or not a floor was reached; 1 when something could not
be run; 2 for wrong options.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import alone
import machine
import report
import servers
import workloads
from alone import Together
from servers import BASELINE, KINDS, SUBJECT, Place, Server, baseline
from workloads import MIB, WORKLOADS, Sample, Workload

FULL = (3, 2.0)  # rounds, seconds a run
QUICK = (1, 0.25)
NO_DISK = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Task:
    """One workload and the servers that take turns at it."""

    kind: str
    workload: Workload | Together
    servers: tuple[str, ...]


def of_kind(kind: str) -> tuple[Workload | Together, ...]:
    """Return the workloads of a kind of disk."""
    return (alone.WORKLOADS[kind],) if kind in alone.WORKLOADS else WORKLOADS[kind]


def selected(patterns: Sequence[str]) -> list[Task]:
    """Return the tasks whose `KIND/WORKLOAD/SERVER` holds any of the patterns (all, if none).

    nbdkit comes along wherever another server is chosen, run in the same way where it can be:
    without it there is no ratio.
    """
    tasks = []
    for kind, names in KINDS.items():
        for workload in of_kind(kind):
            wanted = {
                name
                for name in names
                if not patterns
                or any(fnmatchcase(f"{kind}/{workload.name}/{name}", f"*{p}*") for p in patterns)
            }
            if isinstance(workload, workloads.Crowd):
                wanted -= set(servers.NO_CROWDS)
            if wanted:
                wanted |= {baseline(kind, name) for name in wanted}
                chosen = tuple(name for name in names if name in wanted)
                tasks.append(Task(kind, workload, chosen))
    return tasks


def without(tasks: Sequence[Task], absent: set[str]) -> list[Task]:
    """Return the tasks as they are without some servers.

    A kind is left out when the server that it is there for is absent.
    """
    kept = []
    for task in tasks:
        if servers.REASON.get(task.kind) in absent:
            continue
        names = tuple(name for name in task.servers if name not in absent)
        kept.append(Task(task.kind, task.workload, names))
    return [task for task in kept if task.servers]


def write_random(path: Path, size: int) -> None:
    """Write a file of random bytes, and have it on the disk before anything is measured."""
    with path.open("wb", buffering=0) as file:
        chunk = memoryview(os.urandom(16 * MIB))
        while (missing := size - file.tell()) > 0:
            file.write(chunk[:missing])
        os.fsync(file.fileno())


def settle(place: Place) -> None:
    """Write out what an earlier run left dirty, so that no server pays for another's."""
    with place.disk.open("rb+") as file:
        os.fdatasync(file.fileno())


class Bench:
    """The rounds: it starts servers, lets them take turns, and keeps what comes out."""

    def __init__(self, place: Place, rounds: int, seconds: float, say: Callable[[str], None]):
        self.place = place
        self.rounds = rounds
        self.seconds = seconds
        self.say = say
        self.records: list[report.Record] = []
        self.failures: list[str] = []

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks, one kind of disk after the other."""
        for kind in dict.fromkeys(task.kind for task in tasks):
            mine = [task for task in tasks if task.kind == kind]
            for number in range(1, self.rounds + 1):
                self._round(kind, number, mine)

    def _round(self, kind: str, number: int, tasks: Sequence[Task]) -> None:
        if kind in alone.WORKLOADS:
            for task in tasks:
                self._together(alone.WORKLOADS[kind], number, task)
            return
        running: dict[str, Server] = {}
        try:
            for name in dict.fromkeys(name for task in tasks for name in task.servers):
                self._start(running, name, kind)
            for task in tasks:
                for name in task.servers:
                    if name in running:
                        self._measure(running, name, task, number)
        finally:
            for server in running.values():
                server.stop()

    def _start(self, running: dict[str, Server], name: str, kind: str) -> None:
        try:
            server = running[name] = Server(name, kind, self.place)
            if kind not in servers.NOT_FILLED:
                workloads.fill(server, self.place)
        except (servers.ServerError, workloads.WorkloadError, OSError) as error:
            self._failed(f"{kind}: {name} cannot be measured: {error}")
            if name in running:
                running.pop(name).stop()

    def _together(self, workload: Together, number: int, task: Task) -> None:
        try:
            samples = workload.run_all(task.servers, self.place, self.seconds)
        except (workloads.WorkloadError, OSError) as error:
            self._failed(f"{task.kind}/{workload.name}: {error}")
            return
        for name, sample in samples.items():
            self._keep(name, task, number, sample)

    def _measure(self, running: dict[str, Server], name: str, task: Task, number: int) -> None:
        assert not isinstance(task.workload, (alone.Start, alone.Idle))
        if task.kind in servers.FILES:
            settle(self.place)
        server = running[name]
        try:
            sample = task.workload.run(server, self.place, self.seconds)
        except (workloads.WorkloadError, OSError) as error:
            state = "" if server.running() else f"; the server is gone: {server.said()}"
            self._failed(f"{task.kind}/{task.workload.name}/{name}: {error}{state}")
            # A server that failed once may be in any state: the next workload gets a fresh one.
            running.pop(name).stop()
            self._start(running, name, task.kind)
            return
        self._keep(name, task, number, sample)

    def _keep(self, name: str, task: Task, number: int, sample: Sample) -> None:
        where, unit = f"{task.kind}/{task.workload.name}/{name}", task.workload.unit
        record = report.Record(task.kind, task.workload.name, name, number, sample, unit)
        self.records.append(record)
        cpu = sample.cpu_per_request * 1e6
        self.say(
            f"round {number}/{self.rounds}  {where:<52}"
            f" {report.shown(record.value, unit):>14}  CPU {cpu:7.1f} µs"
        )

    def _failed(self, line: str) -> None:
        self.failures.append(line)
        self.say(f"FAILED  {line}")


@contextlib.contextmanager
def prepared(folder: Path, size: int, pynbdkit: Sequence[str]) -> Iterator[Place]:
    """Make the folders and the files that a run needs; remove all of it afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="pynbdkit-bench-", dir=folder) as disks,
        tempfile.TemporaryDirectory(prefix="nbd-") as sockets,
    ):
        place = Place(Path(sockets), Path(disks) / "disk.img", size, pynbdkit)
        write_random(workloads.source_file(place), size)
        write_random(place.disk, size)
        servers.make_certificates(place.disk.parent)
        yield place


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Compare pynbdkit with the other NBD servers installed here."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of short runs: some two minutes")
    help_ = "only what has this in KIND/WORKLOAD/SERVER (* and ? allowed; may be repeated)"
    add("--only", action="append", default=[], metavar="PATTERN", help=help_)
    add("--list", action="store_true", help="print every KIND/WORKLOAD/SERVER chosen, and end")
    add("--rounds", type=int, metavar="N", help=f"rounds (default {FULL[0]}; quick {QUICK[0]})")
    help_ = f"length of each run (default {FULL[1]:g}; quick {QUICK[1]:g})"
    add("--seconds", type=float, metavar="S", help=help_)
    add("--size", type=int, default=512, metavar="MIB", help="size of each disk (default 512)")
    help_ = "where the served file is: on a real disk, not in memory (default /var/tmp)"
    add("--dir", type=Path, default=Path("/var/tmp"), metavar="DIR", help=help_)
    help_ = "how pynbdkit is started (default: by this Python, -m pynbdkit)"
    add("--pynbdkit", default=shlex.join(Place.pynbdkit), metavar="COMMAND", help=help_)
    add("--json", type=Path, metavar="OUT", help="write everything measured, as JSON")
    add("--markdown", type=Path, metavar="OUT", help="write the report to a file, too")
    args = parser.parse_args(argv)
    rounds, seconds = QUICK if args.quick else FULL
    args.rounds = rounds if args.rounds is None else args.rounds
    args.seconds = seconds if args.seconds is None else args.seconds
    if args.rounds < 1 or args.seconds <= 0 or args.size < 4:
        parser.error("--rounds must be 1 at least, --seconds above 0, --size 4 at least")
    args.pynbdkit = shlex.split(args.pynbdkit)
    return args


def missing_clients() -> list[str]:
    """Return a line for each client that is not installed."""
    return [
        f"{tool} is not installed: apt-get install {package}"
        for tool, package in workloads.PACKAGES.items()
        if not shutil.which(tool)
    ]


def obstacles(tasks: Sequence[Task], folder: Path, size: int) -> list[str]:
    """Return what makes a run senseless from the start, a line each."""
    lines = missing_clients()
    if any(isinstance(task.workload, workloads.Fua) for task in tasks):
        if workloads.libnbd_python() is None:
            lines.append("no Python here has the nbd module: apt-get install python3-libnbd")
        if folder.is_dir() and machine.file_system(folder) in NO_DISK:
            lines.append(f"{folder} is in memory, FUA needs a disk: choose another with --dir")
    if not folder.is_dir():
        lines.append(f"{folder} is no folder: choose another with --dir")
    elif shutil.disk_usage(folder).free < 3 * size:
        lines.append(f"{folder} has no room for 2 files of {size // MIB} MiB: see --dir, --size")
    return lines


def version_commands(names: set[str], pynbdkit: Sequence[str]) -> dict[str, list[str]]:
    """Return the command that prints the version of each tool in use."""
    known: dict[str, list[str]] = {
        "nbdkit": ["nbdkit", "--version"],
        "qemu-nbd": ["qemu-nbd", "--version"],
        "nbd-server": ["nbd-server", "-V"],
        SUBJECT: [*pynbdkit, "--version"],
    }
    programs = {servers.program(name) for name in names}
    chosen = {name: argv for name, argv in known.items() if name in programs}
    return chosen | {"fio": ["fio", "--version"], "nbdcopy": ["nbdcopy", "--version"]}


def notes_for(rows: Sequence[report.Row], quiet: bool) -> list[str]:
    """Return what a reader of the table has to know."""
    notes = [
        "Rates and costs are medians over the rounds. A ratio is formed within each round, and "
        "above 1 is better; its median is shown, and in brackets the smallest and the largest."
    ]
    if not quiet:
        notes.append("The machine was not quiet when this began: take the numbers with care.")
    if any(row.server == SUBJECT for row in rows):
        behind = report.missed(rows)
        notes.append(f"Floors missed: {', '.join(behind)}." if behind else "No floor is missed.")
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    args = options(argv)
    tasks = selected(args.only)
    if args.list:
        for task in tasks:
            for name in task.servers:
                print(f"{task.kind}/{task.workload.name}/{name}")
        return 0

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    size = args.size * MIB
    names = {name for task in tasks for name in task.servers}
    place = Place(Path(), Path(), size, args.pynbdkit)
    gaps = {name: line for name in sorted(names) if (line := servers.missing(name, place))}
    lines = obstacles(tasks, args.dir, size)
    if not tasks:
        lines.append(f"nothing is called like {' or '.join(args.only)}: see --list")
    if BASELINE in gaps:
        lines.append(gaps[BASELINE])
    if lines:
        for line in lines:
            say(f"bench: {line}")
        return 1
    for line in gaps.values():
        say(f"bench: left out: {line}")

    tasks = without(tasks, set(gaps))
    facts = machine.facts(version_commands(names - set(gaps), args.pynbdkit), args.dir)
    words = sys.argv[1:] if argv is None else list(argv)
    facts = {"command": shlex.join(["python", "benchmarks/bench.py", *words])} | facts
    facts["runs"] = f"{args.rounds} rounds of {args.seconds:g} s each, disks of {args.size} MiB"
    quiet = machine.load() < 0.5
    interrupted = False
    with prepared(args.dir, size, args.pynbdkit) as place:
        bench = Bench(place, args.rounds, args.seconds, say)
        try:
            bench.run(tasks)
        except KeyboardInterrupt:
            interrupted = True

    rows = report.rows(bench.records)
    notes = notes_for(rows, quiet) + [f"Left out, not there: {name}." for name in gaps]
    notes += [f"Failed: {line}" for line in bench.failures]
    if interrupted:
        notes.append("Interrupted: later rows and rounds are missing.")
    text = report.markdown(rows, facts, notes, everything=not args.only)
    print(text, end="")
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        everything = {
            "facts": facts,
            "notes": notes,
            "records": [asdict(record) for record in bench.records],
            "rows": [asdict(row) | {"verdict": report.verdict(row)} for row in rows],
        }
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if interrupted:
        return 130
    # A peer that is not installed leaves rows out; without pynbdkit there is nothing to show.
    return 1 if bench.failures or SUBJECT in gaps else 0


if __name__ == "__main__":
    sys.exit(main())
