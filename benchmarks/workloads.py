"""What is measured: each workload drives one running server for a moment and answers a `Sample`.

All clients are somebody else's: fio's `nbd` engine (libnbd inside), nbdcopy, and for FUA writes,
which fio cannot send, libnbd's own Python module in a process of its own (fua_client.py). Every
run is checked: a client that failed or did nothing is an error, never a number.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cpu import Stopwatch
from servers import Place, Server

KIB = 1024
MIB = 1024 * KIB
COPY_REQUEST = 256 * KIB  # nbdcopy's default --request-size
CROWD_RATE = 200_000
"""Requests that a crowd sends for each second that it is given: some seconds of work."""
FUA_DIRTY = 256 * MIB
FUA_BURST = 256
FUA_DEPTH = 16
PACKAGES = {"fio": "fio", "nbdcopy": "libnbd-bin", "certtool": "gnutls-bin"}


class WorkloadError(Exception):
    """A client failed, or did nothing; the text says which and what it wrote."""


@dataclass(frozen=True)
class Sample:
    """What one run of one workload on one server gave."""

    requests: int
    seconds: float
    nbytes: int
    cpu: float  # the server's CPU seconds

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    @property
    def cpu_per_request(self) -> float:
        """Server CPU seconds a request."""
        return self.cpu / self.requests


class Workload(Protocol):
    """One row of the comparison."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """What the table shows, one of report.UNITS."""

    def run(self, server: Server, place: Place, seconds: float) -> Sample: ...


def run_client(argv: list[str], timeout: float) -> str:
    """Run a client to its end, return its stdout; raise WorkloadError if it failed."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise WorkloadError(f"{argv[0]} did not end within {timeout:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise WorkloadError(f"{argv[0]} failed with status {done.returncode}: {said[-1]}")
    return done.stdout


def parse_fio(output: str) -> tuple[int, float, int]:
    """Return requests, seconds and bytes from fio's JSON, in which all jobs are one group.

    The nbd engine prints lines of its own before the JSON begins. Raises WorkloadError when it is
    no JSON, a job had an error, or nothing was done.
    """
    start = output.find("{")
    try:
        jobs: list[dict[str, Any]] = json.loads(output[start:])["jobs"] if start >= 0 else []
    except (ValueError, KeyError) as error:
        raise WorkloadError(f"fio's output cannot be read: {error!r}") from None
    if len(jobs) != 1:
        raise WorkloadError(f"fio reported {len(jobs)} groups of jobs, one was expected")
    if jobs[0]["error"]:
        raise WorkloadError(f"fio's job ended with error {jobs[0]['error']}")
    sides = [jobs[0]["read"], jobs[0]["write"]]
    requests = sum(int(side["total_ios"]) for side in sides)
    nbytes = sum(int(side["io_bytes"]) for side in sides)
    seconds = max(int(side["runtime"]) for side in sides) / 1000
    if requests <= 0 or seconds < 0:
        raise WorkloadError("fio did no I/O")
    return requests, max(seconds, 0.001), nbytes  # fio counts milliseconds


@dataclass(frozen=True)
class Fio:
    """A time-based fio job; `jobs` of them are so many connections, each at `depth`."""

    name: str
    rw: str
    block: int
    depth: int
    jobs: int = 1

    @property
    def unit(self) -> str:
        return "MiB/s" if self.block > 64 * KIB else "/s"

    def argv(self, uri: str, *until: str) -> list[str]:
        """Return the command; `until` are the options that say when to end."""
        return [
            "fio",
            "--name=bench",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--rw={self.rw}",
            f"--bs={self.block}",
            f"--iodepth={self.depth}",
            f"--numjobs={self.jobs}",
            "--group_reporting",
            "--norandommap",
            "--output-format=json",
            *until,
        ]

    def run(self, server: Server, place: Place, seconds: float) -> Sample:
        until = ("--time_based", f"--runtime={round(seconds * 1000)}ms")
        watch = Stopwatch(server.pid)
        watch.start()
        output = run_client(self.argv(server.uri, *until), timeout=seconds + 30)
        return Sample(*parse_fio(output), watch.stop())


@dataclass(frozen=True)
class Crowd(Fio):
    """As many requests as connections by the hundred get done, without what it takes to come.

    A fio job's time begins when it is connected, and the last of 256 is connected when the first
    one's time is nearly over: the rates that each saw do not add up. So the work is given, not the
    time, and done twice, little of it and much: what the clock and the server's CPU show more the
    second time is for the requests that are more.
    """

    def run(self, server: Server, place: Place, seconds: float) -> Sample:
        little = self._work(server, self.depth)
        much = self._work(server, self.depth + max(1, round(CROWD_RATE * seconds / self.jobs)))
        requests, elapsed = much.requests - little.requests, much.seconds - little.seconds
        if requests <= 0 or elapsed <= 0:
            raise WorkloadError("more requests did not take longer: give it more --seconds")
        cpu = max(0.0, much.cpu - little.cpu)
        return Sample(requests, elapsed, much.nbytes - little.nbytes, cpu)

    def _work(self, server: Server, requests: int) -> Sample:
        argv = self.argv(server.uri, f"--io_size={requests * self.block}")
        watch = Stopwatch(server.pid)
        watch.start()
        begin = time.perf_counter()
        done, _, nbytes = parse_fio(run_client(argv, timeout=120))
        return Sample(done, time.perf_counter() - begin, nbytes, watch.stop())


@dataclass(frozen=True)
class Copy:
    """A whole copy by nbdcopy with its defaults, again and again until the time is over.

    Reading goes to nbdcopy's `null:`; writing comes from a local file of random bytes in the page
    cache, without holes, so that all of it is sent. A request counts as nbdcopy's default size.
    """

    name: str
    reading: bool
    unit: str = "MiB/s"

    def run(self, server: Server, place: Place, seconds: float) -> Sample:
        source = server.uri if self.reading else str(source_file(place))
        argv = ["nbdcopy", source, "null:" if self.reading else server.uri]
        watch = Stopwatch(server.pid)
        watch.start()
        copies = 0
        begin = time.perf_counter()
        while not copies or time.perf_counter() - begin < seconds:
            run_client(argv, timeout=60)
            copies += 1
        elapsed = time.perf_counter() - begin
        nbytes = copies * place.size
        return Sample(nbytes // COPY_REQUEST, elapsed, nbytes, watch.stop())


@functools.cache
def libnbd_python() -> str | None:
    """Return a Python that can `import nbd`: this one or the system's, where Debian has it."""
    for python in (sys.executable, "/usr/bin/python3", shutil.which("python3")):
        if python and Path(python).exists():
            done = subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False)
            if done.returncode == 0:
                return python
    return None


class _FuaClient:
    """fua_client.py, running."""

    def __init__(self, uri: str, depth: int) -> None:
        python = libnbd_python()
        if python is None:
            raise WorkloadError("no Python here has the nbd module: apt-get install python3-libnbd")
        script = Path(__file__).resolve().parent / "fua_client.py"
        self._process = subprocess.Popen(
            [python, str(script), uri, str(depth)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def order(self, verb: str, amount: float) -> str:
        """Give it one order; return its answer."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(f"{verb} {amount}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = self._process.communicate()[1].strip().splitlines() or ["no message"]
            raise WorkloadError(f"the FUA client failed: {said[-1]}")
        return answer

    def measured(self, verb: str, amount: float) -> tuple[int, float]:
        """Give an order that measures; return requests and seconds."""
        answer = json.loads(self.order(verb, amount))
        if answer["requests"] <= 0:
            raise WorkloadError("the FUA client did no I/O")
        return int(answer["requests"]), float(answer["seconds"])

    def end(self) -> None:
        """Let it go; kill it if it does not."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


@dataclass(frozen=True)
class Fua:
    """4 KiB FUA writes at depth 16, after 256 MiB (or half the disk) were written unflushed.

    With `bursts`, each measured burst of 256 writes has the file dirty behind it: what a database's
    commit meets while a guest copies files. Without, the file is made dirty once, and the writes
    go on for the time given: a server that flushes the whole file pays for that at the first only.
    """

    name: str
    bursts: bool
    unit: str = "/s"

    def run(self, server: Server, place: Place, seconds: float) -> Sample:
        watch = Stopwatch(server.pid)
        client = _FuaClient(server.uri, FUA_DEPTH)
        requests, elapsed, cpu = 0, 0.0, 0.0
        end = time.monotonic() + seconds
        try:
            while not requests or (self.bursts and time.monotonic() < end):
                client.order("dirty", FUA_DIRTY)
                # Its connection lives on: children that exist now are not waited for.
                watch.start()
                order = ("writes", float(FUA_BURST)) if self.bursts else ("seconds", seconds)
                done, took = client.measured(*order)
                cpu += watch.stop()
                requests += done
                elapsed += took
        finally:
            client.end()
        return Sample(requests, elapsed, requests * 4 * KIB, cpu)


def source_file(place: Place) -> Path:
    """Return where the random bytes are that fill the disks and that nbdcopy sends."""
    return place.disk.with_name("random.img")


def fill(server: Server, place: Place) -> None:
    """Fill a disk with random bytes, so that reads find data and not holes."""
    run_client(["nbdcopy", str(source_file(place)), server.uri], timeout=120)


_SMALL = tuple(
    Fio(f"{rw}-4k-d{depth}", rw, 4 * KIB, depth)
    for depth in (1, 2, 4, 16, 64)
    for rw in ("randread", "randwrite")
)
_FOUR = tuple(Fio(f"{rw}-4k-d16-x4", rw, 4 * KIB, 16, jobs=4) for rw in ("randread", "randwrite"))
# A crowd, none of which is very busy; and some whose requests are larger.
_MANY = (
    *(Crowd(f"{rw}-4k-d4-x32", rw, 4 * KIB, 4, jobs=32) for rw in ("randread", "randwrite")),
    *(Fio(f"{rw}-64k-d4-x4", rw, 64 * KIB, 4, jobs=4) for rw in ("randread", "randwrite")),
)
# Depth 4: a megabyte in flight keeps server and client both at work, as a kernel's read-ahead does;
# depth 1 would measure the hand-over, a great depth only how much a socket's buffer holds.
_LARGE = tuple(Fio(f"{rw}-256k-d4", rw, 256 * KIB, 4) for rw in ("read", "write"))
_COPIES = (Copy("nbdcopy-out", reading=True), Copy("nbdcopy-in", reading=False))
_FUA = (Fua("fua-4k-d16-dirty", bursts=True), Fua("fua-4k-d16-steady", bursts=False))
_SIXTEEN = tuple(fio for fio in _SMALL if fio.depth == 16)

# Depth 64 gives every thread work; at 256 there are more requests than anybody has threads.
_SLOW = tuple(Fio(f"randread-4k-d{depth}", "randread", 4 * KIB, depth) for depth in (64, 256))

WORKLOADS: dict[str, tuple[Workload, ...]] = {
    "memory": (*_SMALL, *_FOUR, *_MANY, *_LARGE, *_COPIES),
    "file": (*_SMALL, *_FOUR, *_MANY, *_LARGE, *_COPIES, *_FUA),
    "tls": (*_SIXTEEN, *_LARGE, *_COPIES),
    "script": _SIXTEEN,
    "native": (*_SIXTEEN, *_LARGE),
    "filters": _SIXTEEN,
    "slow": _SLOW[:1],
    "async": _SLOW,
    "memory-workers": _FOUR,
    "file-workers": _FOUR,
}
