#!/usr/bin/env python3
"""A day's requests in minutes, and nothing of them stays: `make soak`.

For each plugin a server of the command line gets half of the requests, or half of the time,
whichever is over first. The bulk comes from fio, 64 requests in flight on each of two connections,
which comes again every few seconds with another mix; beside it

- a client (libnbd) that does everything there is, one request after the other: reads, writes (and
  reads them again), zeros, trims, flushes, caches, block status, with and without FUA;
- clients that come, stop somewhere, and go without a goodbye (crowd.py).

Every few seconds the server's resident memory, threads and descriptors are noted. What is promised:

- memory does not grow with requests: over the second half, the slope (the median of the slopes
  between all pairs of samples) is at most 1 MiB for 10 million requests; where that half has fewer
  than 10 million, which is too short to tell, 8 MiB in all;
- when the clients have gone, there are as many descriptors and threads as before they came.

Exit status: 0 promises kept, 1 broken, 2 wrong options.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import crowd
from subject import KIB, MIB, PATIENCE, PYNBDKIT, Figures, Subject, SubjectError

import support

REQUESTS = 100_000_000
MINUTES = 20.0
SEGMENT = 10.0
"""Seconds until fio comes again."""
SAMPLE = 2.0
"""Seconds between two looks at the server."""
TOO_FEW = 10_000_000
GROWTH = 1 * MIB / TOO_FEW
"""Bytes a request that memory may grow by."""
GROWTH_OF_FEW = 8 * MIB
"""Bytes that it may grow by over fewer than `TOO_FEW` requests: buffers come and go."""
SAMPLES_COMPARED = 400
ROWS = 20

# The disk: where fio reads and writes, where it trims, where the client is that does everything.
# Trimmed memory is given back, and comes again: as little of it as a sample may be wrong by.
BULK = 62 * MIB
TRIMMED = 1 * MIB
ODD = 1 * MIB
DISK = BULK + TRIMMED + ODD

CONNECTIONS = ("--iodepth=64", "--numjobs=2")
READ = ("--rw=randread", "--bs=4k", f"--size={BULK}", *CONNECTIONS)
WRITE = ("--rw=randwrite", "--bs=4k", f"--size={BULK}", *CONNECTIONS)
MIXED = ("--rw=randrw", "--bssplit=4k/90:512/5:64k/5", "--fsync=1000", *READ[2:])
TRIM = ("--rw=randtrim", "--bs=4k", f"--offset={BULK}", f"--size={TRIMMED}", *CONNECTIONS)
MIXES = (READ, WRITE, MIXED, READ, WRITE, TRIM)
PLUGINS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "memory": lambda folder: ("memory", str(DISK)),
    "file": lambda folder: ("file", str(folder / "disk")),
}


class SoakError(Exception):
    """A client was told something wrong, or failed."""


@dataclass(frozen=True)
class Sample:
    """What the server had, when so many requests had been answered."""

    seconds: float
    requests: float
    rss: int
    threads: int
    descriptors: int


def between(seconds: float, known: Sequence[tuple[float, float]]) -> float:
    """Return how many requests had been answered, from what is known of other moments."""
    for (begin, low), (end, high) in itertools.pairwise(known):
        if seconds <= end:
            return low + (high - low) * max(0.0, seconds - begin) / (end - begin)
    return known[-1][1]


def slope(samples: Sequence[Sample]) -> float:
    """Return bytes a request that memory grows by: the median over all pairs of samples."""
    step = max(1, len(samples) // SAMPLES_COMPARED)
    few = samples[::step]
    slopes = [
        (after.rss - before.rss) / (after.requests - before.requests)
        for number, before in enumerate(few)
        for after in few[number + 1 :]
        if after.requests > before.requests
    ]
    return statistics.median(slopes) if slopes else 0.0


def grown(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return bytes that memory grew by in the second half of the requests, and how many it may."""
    half = [sample for sample in samples if sample.requests >= samples[-1].requests / 2]
    requests = half[-1].requests - half[0].requests
    return slope(half) * requests, GROWTH * requests if requests >= TOO_FEW else GROWTH_OF_FEW


@dataclass
class Report:
    """What one server went through, and which promises it broke."""

    plugin: str
    samples: list[Sample] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    odd: int = 0
    visits: int = 0
    connections: int = 0

    def judge(self) -> None:
        """See whether memory grew."""
        growth, allowed = grown(self.samples)
        if growth > allowed:
            self.broken.append(
                f"memory grows: {growth / MIB:.1f} MiB over the second half,"
                f" at most {allowed / MIB:.1f} MiB are promised"
            )

    def table(self) -> str:
        """Return the samples, some twenty of them, and what was done in all."""
        growth, allowed = grown(self.samples)
        last = self.samples[-1]
        step = max(1, -(-len(self.samples) // ROWS))
        rows = [*self.samples[:-1:step], last]
        lines = [
            f"## {self.plugin}",
            "",
            "| seconds | million requests | resident, MiB | threads | descriptors |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {one.seconds:.0f} | {one.requests / 1e6:.2f} | {one.rss / MIB:.1f}"
            f" | {one.threads} | {one.descriptors} |"
            for one in rows
        ]
        lines += [
            "",
            f"{last.requests / 1e6:.2f} million requests in {last.seconds:.0f} s on"
            f" {self.connections + self.visits:,} connections ({self.odd:,} requests of every kind"
            f" from one client, {self.visits:,} clients that left anyhow); memory over the second"
            f" half: {growth / KIB:+.0f} KiB, {allowed / MIB:.1f} MiB are allowed",
        ]
        return "\n".join(lines)


class Odd:
    """The client that does everything, in a part of the disk that nobody else touches."""

    ROUND = 500
    """Requests until it connects again."""
    PAUSE = 0.2
    """Seconds until then: the processors are for the bulk."""

    def __init__(self, nbd: ModuleType, uri: str, report: Report) -> None:
        self._nbd = nbd
        self._uri = uri
        self._report = report
        self._chance = random.Random(1)

    def run(self, stop: threading.Event) -> None:
        """Go on until told to stop."""
        try:
            while not stop.is_set():
                self._connection(stop)
        except self._nbd.Error as error:
            self._report.broken.append(f"a request of {self._report.odd} failed: {error}")
        except SoakError as error:
            self._report.broken.append(str(error))

    def _connection(self, stop: threading.Event) -> None:
        handle = self._nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(self._uri)
        self._report.connections += 1
        for _ in range(self.ROUND):
            if stop.is_set():
                break
            self._request(handle)
            self._report.odd += 1
        handle.shutdown()
        stop.wait(self.PAUSE)

    def _request(self, handle: object) -> None:
        chance, client, nbd = self._chance, handle, self._nbd
        count = 512 << chance.randrange(8)
        offset = DISK - ODD + chance.randrange((ODD - count) // 512) * 512
        fua = nbd.CMD_FLAG_FUA if chance.random() < 0.1 else 0
        kind = chance.choice(("read", "write", "zero", "trim", "flush", "cache", "extents"))
        done: dict[str, Callable[[], object]] = {
            "read": lambda: client.pread(count, offset),  # type: ignore[attr-defined]
            "zero": lambda: client.zero(count, offset, fua),  # type: ignore[attr-defined]
            "trim": lambda: client.trim(count, offset, fua),  # type: ignore[attr-defined]
            "flush": lambda: client.flush(),  # type: ignore[attr-defined]
            "cache": lambda: client.cache(count, offset),  # type: ignore[attr-defined]
            "extents": lambda: client.block_status(  # type: ignore[attr-defined]
                count, offset, lambda *_: 0
            ),
        }
        if kind == "write":
            self._write(handle, chance.randbytes(count), offset, fua)
        elif kind != "flush" or chance.random() < 0.1:  # the file's disk is slow
            done[kind]()

    def _write(self, handle: object, data: bytes, offset: int, fua: int) -> None:
        handle.pwrite(data, offset, fua)  # type: ignore[attr-defined]
        if handle.pread(len(data), offset) != data:  # type: ignore[attr-defined]
            raise SoakError(f"{len(data)} bytes at {offset} are not what was written")


def fio(uri: str, mix: Sequence[str], seconds: float) -> int:
    """Run a moment of fio; return how many requests were answered. Raises SoakError."""
    argv = ["fio", "--name=soak", "--ioengine=nbd", f"--uri={uri}", *mix, "--group_reporting"]
    argv += ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--norandommap"]
    argv += ["--output-format=json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 60, check=False)
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise SoakError(f"fio failed with status {done.returncode}: {said[-1]}")
    (job,) = json.loads(done.stdout[start:])["jobs"]
    count = sum(int(job[kind]["total_ios"]) for kind in ("read", "write", "trim"))
    if job["error"] or not count:
        raise SoakError(f"fio {mix[0]} did {count} requests, error {job['error']}")
    return count


class Soak:
    """One server under everything at once."""

    def __init__(
        self, server: Subject, report: Report, requests: float, seconds: float, segment: float
    ) -> None:
        self.server = server
        self.report = report
        self.requests = requests
        self.seconds = seconds
        self.segment = segment
        self.uri = f"nbd+unix:///?socket={server.address}"
        self._looks: list[tuple[float, Figures]] = []
        self._stop = threading.Event()

    def run(self, nbd: ModuleType, every: float = SAMPLE, patience: float = PATIENCE) -> None:
        """Go on until the requests or the seconds are over; then nothing may be left."""
        crowd.churn(self.server.address, (*crowd.NEGOTIATION, *crowd.TRANSMISSION), 50)
        fill(nbd, self.uri)
        for mix in dict.fromkeys(MIXES):  # what is loaded or reserved once is no growth
            fio(self.uri, mix, min(self.segment, 1.0))
        before = self.server.quiet()
        odd = Odd(nbd, self.uri, self.report)
        threads = [
            threading.Thread(target=odd.run, args=(self._stop,)),
            threading.Thread(target=self._guarded, args=(self._visit,)),
            threading.Thread(target=self._guarded, args=(lambda: self._look(every),)),
        ]
        self._begin = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            known = self._bulk()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        self.report.samples += [
            Sample(at, between(at, known), seen.rss, seen.threads, seen.descriptors)
            for at, seen in self._looks
        ]
        # The thread that watches the others may not have been there at first.
        after, _ = self.server.settle(before.threads + 1, before.descriptors, patience)
        at, requests = known[-1]
        last = Sample(at, requests, after.rss, after.threads, after.descriptors)
        self.report.samples.append(last)

    def _bulk(self) -> list[tuple[float, float]]:
        """Return moments, and how many requests had been answered by then."""
        known = [(0.0, 0.0)]
        bulk = 0
        while True:
            mix = MIXES[(len(known) - 1) % len(MIXES)]
            bulk += fio(self.uri, mix, self.segment)
            self.report.connections += 2
            at = time.monotonic() - self._begin
            known.append((at, float(bulk + self.report.odd)))
            # A run has every mix at least once.
            over = known[-1][1] >= self.requests or at >= self.seconds
            if self.report.broken or (over and len(known) > len(MIXES)):
                return known

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                work()
        except (SubjectError, OSError, EOFError) as error:
            self.report.broken.append(str(error) or repr(error))

    def _visit(self) -> None:
        states = (*crowd.NEGOTIATION, *crowd.TRANSMISSION)
        crowd.churn(self.server.address, states, 3 * len(states))
        self.report.visits += 3 * len(states)
        self._stop.wait(0.2)

    def _look(self, every: float) -> None:
        self._looks.append((time.monotonic() - self._begin, self.server.figures()))
        self._stop.wait(every)


def fill(nbd: ModuleType, uri: str) -> None:
    """Write the whole disk, so that its memory is not what grows."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = random.Random(2).randbytes(MIB)
    for offset in range(0, DISK, MIB):
        handle.pwrite(data, offset)
    handle.shutdown()


def soak(
    plugin: str,
    requests: float,
    seconds: float,
    segment: float = SEGMENT,
    every: float = SAMPLE,
    command: Sequence[str] = PYNBDKIT,
    words: Callable[[Path], tuple[str, ...]] | None = None,
    patience: float = PATIENCE,
) -> Report:
    """Put a server through it; `words` are what it serves, if not the plugin's.

    `patience`: seconds that it may take to let go of what its clients needed.
    """
    nbd = support.libnbd()
    report = Report(plugin)
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        with (Path(folder) / "disk").open("wb") as file:
            file.truncate(DISK)
        try:
            served = (words or PLUGINS[plugin])(Path(folder))
            with Subject(Path(folder), served, command=command) as server:
                Soak(server, report, requests, seconds, segment).run(nbd, every, patience)
        except (SubjectError, SoakError, OSError, EOFError) as error:
            report.broken.append(str(error) or repr(error))
    if report.samples:
        report.judge()
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("plugins", nargs="*", metavar="PLUGIN", help=f"{' or '.join(PLUGINS)} (default both)")
    help_ = f"how many in all (default {REQUESTS / 1e6:.0f} million)"
    add("--requests", type=float, default=REQUESTS, metavar="N", help=help_)
    help_ = f"how long at most in all (default {MINUTES:g})"
    add("--minutes", type=float, default=MINUTES, metavar="M", help=help_)
    options = parser.parse_args(argv)
    plugins = options.plugins or list(PLUGINS)
    for name in plugins:
        if name not in PLUGINS:
            parser.error(f"unknown plugin {name!r} (there are {', '.join(PLUGINS)})")
    if options.requests <= 0 or options.minutes <= 0:
        parser.error("--requests and --minutes must be above 0")
    broken = 0
    for name in plugins:
        seconds = options.minutes * 60 / len(plugins)
        segment = max(0.5, min(SEGMENT, seconds / 20))
        every = max(0.1, min(SAMPLE, seconds / 40))
        report = soak(name, options.requests / len(plugins), seconds, segment, every)
        if report.samples:
            print(report.table(), end="\n\n", flush=True)
        for text in report.broken:
            print(f"BROKEN: {name}: {text}", file=sys.stderr)
        broken += len(report.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
