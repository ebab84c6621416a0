"""The server dies amid writes, again and again: is what it had promised there?

    python campaigns/crash.py [--minutes 20] [--only kill,power,raw,order] [--mutants]

Four ways of looking, each with several chains of filters over the file plugin, and a load of
writes, zeros, trims and flushes, with and without FUA, on up to four connections with up to sixteen
in flight on each:

- kill: SIGKILL at a random moment, a look at the file, restart, the same again on the same file.
  What a process has handed to the kernel survives the process, so here *everything that was
  answered* has to be there: replies do not run ahead of the writing. Syncs are not tested by it.
- power: the file is on a filesystem whose device keeps its history (power.py). For many moments
  right after an answer, a disk is built as a power cut may leave it; mounted, it has to hold
  everything that was promised by then.
- raw: the same, but what is served is the device itself, without a filesystem.
- order: strace watches; each answer is to come after the sync that it speaks of.

With --mutants, each mutant of the source (mutants.py) is run instead, until one is noticed by every
way of looking that should notice it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import mutants
from ledger import TRIM, Ledger
from power import LOSSES, Device
from writers import LOADS, Writers

import pynbdkit
import support
from block_device import attached, mounted, needs
from system_calls import CALLS, Trace

MIB = 1 << 20
SIZE = 8 * MIB
DEVICE_SIZE = 64 * MIB
SHIFT = MIB
"""Where the disk begins in the file, for the chain that has the offset filter."""
CHAINS: dict[str, tuple[str, ...]] = {
    "file": ("file", "{disk}"),
    "threads": ("--filter=delay", "file", "{disk}", "wdelay=1ms"),
    "fua by flush": ("--filter=fua", "file", "{disk}", "fuamode=emulate"),
    "fua always": ("--filter=fua", "file", "{disk}", "fuamode=force"),
    "no cache": ("file", "{disk}", "cache=none"),
    "many filters": (
        "--filter=log", "--filter=offset", "--filter=nozero", "file", "{disk}",
        f"offset={SHIFT}", "logfile={disk}.log", "zeromode=emulate",
    ),
}  # fmt: skip
NOT_WITH = {
    # With every write stable already, a flush has nothing to do, so there is no sync to be seen.
    ("order", "fua always"),
    # Its log would be in /dev.
    ("raw", "many filters"),
}
WAYS = ("kill", "power", "raw", "order")
ATTEMPTS = 10
"""Rounds in which a mutant has to be noticed: somebody else's sync may hide it for a while."""


@dataclass
class Result:
    """What rounds of one kind came to."""

    rounds: int = 0
    answered: int = 0
    promised: int = 0
    cuts: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Count another round in."""
        self.rounds += other.rounds
        self.answered += other.answered
        self.promised += other.promised
        self.cuts += other.cuts
        self.problems += other.problems

    def __str__(self) -> str:
        cuts = f", {self.cuts} cuts" if self.cuts else ""
        return (
            f"{self.rounds} rounds{cuts}, {self.answered} changes answered,"
            f" {self.promised} of them promised, {len(self.problems)} problems"
        )


class Campaign:
    """One chain under attack, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        chain: str,
        *,
        seed: int = 1,
        source: Path | None = None,
        load: str | None = None,
        nbd: ModuleType | None = None,
    ) -> None:
        """source: a source tree to run the server from, instead of this one. load: a single one."""
        self._folder = folder
        self._words = CHAINS[chain]
        self._shift = SHIFT if "--filter=offset" in self._words else 0
        self._rng = random.Random(seed)
        self._python = ["env", f"PYTHONPATH={source}", sys.executable] if source else []
        self._nbd = nbd or support.libnbd()
        self._load = load
        self._ledger: Ledger | None = None

    # -- steps -----------------------------------------------------------------------------------

    def _make_disk(self, path: Path) -> bytes:
        """Half of it full of something else, half a hole; all of it stable. Returns the disk."""
        content = self._rng.randbytes(SIZE // 2) + bytes(SIZE // 2)
        with path.open("wb") as stream:
            stream.seek(self._shift)
            stream.write(content[: SIZE // 2])
            stream.truncate(self._shift + SIZE)
            os.fsync(stream.fileno())
        return content

    def _content(self, path: Path) -> bytes:
        with path.open("rb") as stream:
            return os.pread(stream.fileno(), SIZE, self._shift)

    def _serve(self, disk: Path, command: Sequence[str] = ()) -> support.ServerProcess:
        folder = self._folder / "server"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        python = self._python or [sys.executable]
        words = [word.format(disk=disk) for word in self._words]
        return support.ServerProcess(folder, words, [*command, *python, "-m", "pynbdkit"])

    def _check_export(self, server: support.ServerProcess, expected: bytes) -> list[str]:
        """What a client of the new server reads is what the file has."""
        client = self._nbd.NBD()
        client.connect_uri(server.uri)
        same = client.get_size() == SIZE and all(
            client.pread(MIB, start) == expected[start : start + MIB]
            for start in range(0, SIZE, MIB)
        )
        client.shutdown()
        return [] if same else ["the restarted server reads something else than the file has"]

    def _writers(self, uri: str, ledger: Ledger, without: str = "-") -> Writers:
        """The mixed load in half of the rounds, one of the others in the rest."""
        rng = self._rng
        name = self._load or rng.choice(["mixed"] * (len(LOADS) - 1) + [*LOADS][1:])
        load = LOADS[name]
        mix = {kind: weight for kind, weight in load.mix.items() if not kind.startswith(without)}
        return Writers(self._nbd, uri, ledger, rng, replace(load, mix=mix))

    # -- ways of looking -------------------------------------------------------------------------

    def kill(self) -> Result:
        """A round with SIGKILL; the next one goes on with the same file."""
        disk = self._folder / "disk"
        if self._ledger is None:
            self._ledger = Ledger(self._make_disk(disk))
        ledger = self._ledger
        server = self._serve(disk)
        try:
            problems = self._check_export(server, ledger.base)
            writers = self._writers(server.uri, ledger)
            killer = threading.Timer(self._rng.uniform(0.02, 0.4), server.process.kill)
            killer.start()
            writers.run(lambda: True)
            killer.join()
        finally:
            status = server.stop(signal.SIGKILL)
        if status != -signal.SIGKILL:
            problems.append(f"the server ended with {status} by itself: {server.log()}")
        problems += [f"{what}: errno {number}" for what, number in writers.errors]
        found = self._content(disk)
        problems += ledger.check(found, power=False)
        result = Result(1, len(ledger.answered), len(ledger.promised), problems=problems)
        ledger.rebase(found)
        return result

    def order(self, requests: int = 400) -> Result:
        """A round under strace."""
        disk, trace, pidfile = (self._folder / name for name in ("traced", "trace", "pid"))
        ledger = Ledger(self._make_disk(disk))
        pidfile.unlink(missing_ok=True)
        strace = [
            support.program("strace"), "-f", "-y", "-xx", "-s", "600000", "-e", f"trace={CALLS}",
            "-o", str(trace),
        ]  # fmt: skip
        command = [*strace, *(self._python or [sys.executable]), "-m", "pynbdkit", "-P", pidfile]
        folder = self._folder / "server"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        words = [word.format(disk=disk) for word in self._words]
        server = support.ServerProcess(folder, words, [str(word) for word in command])
        try:
            sizes = (1, 2, 8, 8, 9, 32)
            load = LOADS[self._load or "mixed"]
            writers = Writers(self._nbd, server.uri, ledger, self._rng, load, sizes=sizes)
            writers.run(lambda: writers.sent < requests)
            writers.close()
        finally:
            os.kill(int(pidfile.read_text()), signal.SIGTERM)
            try:
                status = server.process.wait(60)  # after it, strace has written its last line
            except subprocess.TimeoutExpired:
                os.kill(int(pidfile.read_text()), signal.SIGKILL)
                raise
        problems = [] if status == 0 else [f"the server ended with {status}: {server.log()}"]
        seen = Trace(trace)
        problems += seen.broken
        if sum(seen.checked.values()) != writers.sent or writers.errors:
            problems.append(f"{seen.checked} of {writers.sent} requests seen, {writers.errors}")
        problems += ledger.check(self._content(disk), power=False)
        return Result(1, len(ledger.answered), len(ledger.promised), problems=problems)

    def power(self, cuts: int = 40, seconds: float = 1.0) -> Result:
        """A load on a filesystem; then what so many power cuts during it would have left."""
        device = Device(DEVICE_SIZE)
        point, image = self._folder / "mnt", self._folder / "image"
        with (
            pynbdkit.serve(device) as export,
            attached(export.uri, self._folder / "fuse") as block,
        ):
            make = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,nodiscard")
            support.run(*make, block)
            with mounted(block, point) as root:
                ledger = Ledger(self._make_disk(root / "disk"))
                support.run("sync", "-f", root)
                device.begin()
                writers = self._load_for(seconds, root / "disk", ledger)

        def recover(disk: bytearray) -> bytes:
            image.write_bytes(disk)
            with mounted(image, point, "loop") as root:
                return self._content(root / "disk")

        return self._cut(cuts, device, ledger, writers, recover)

    def raw(self, cuts: int = 40, seconds: float = 1.0) -> Result:
        """As `power`, with the device itself as the disk."""
        device = Device(SIZE)
        device.pwrite(self._rng.randbytes(SIZE // 2), 0, 0)
        device.begin()
        ledger = Ledger(device.pread(SIZE, 0, 0))
        with (
            pynbdkit.serve(device) as export,
            attached(export.uri, self._folder / "fuse") as block,
        ):
            # It has no trim, so a trim may leave what was there: more than the ledger allows.
            writers = self._load_for(seconds, block, ledger, without=TRIM)
        return self._cut(cuts, device, ledger, writers, bytes)

    def _load_for(self, seconds: float, disk: Path, ledger: Ledger, without: str = "-") -> Writers:
        """Serve a disk, and write to it; returns the writers that did."""
        server = self._serve(disk)
        try:
            writers = self._writers(server.uri, ledger, without)
            end = time.monotonic() + seconds
            writers.run(lambda: time.monotonic() < end)
        finally:
            server.stop(signal.SIGKILL)
        return writers

    def _cut(
        self,
        cuts: int,
        device: Device,
        ledger: Ledger,
        writers: Writers,
        recover: Callable[[bytearray], bytes],
    ) -> Result:
        """Cut the power right after some of the answers; `recover`: from a device to the disk."""
        problems = [f"{what}: errno {number}" for what, number in writers.errors]
        moments = sorted({entry.promised for entry in ledger.promised})
        chosen = self._rng.sample(moments, min(cuts, len(moments)))
        for moment in chosen:
            loss = self._rng.choice(LOSSES)
            found = recover(device.after(moment, loss, self._rng))
            problems += [
                f"power cut, {loss} lost: {problem}" for problem in ledger.check(found, moment)
            ]
        answered, promised = len(ledger.answered), len(ledger.promised)
        return Result(1, answered, promised, len(chosen), problems)

    def run(self, way: str) -> Result:
        """One round of a way of looking."""
        rounds = {"kill": self.kill, "power": self.power, "raw": self.raw, "order": self.order}
        return rounds[way]()


@contextmanager
def folder_for(base: Path | None) -> Iterator[Path]:
    """A folder whose path is short enough for a socket, empty at first and removed at the end."""
    with tempfile.TemporaryDirectory(prefix="pnk", dir=base) as name:
        yield Path(name)


def campaign(
    ways: Sequence[str], chains: Sequence[str], minutes: float, seed: int, base: Path | None
) -> dict[tuple[str, str], Result]:
    """Rounds of every way and chain in turn, until the time is over; at least one of each."""
    results = {
        (way, chain): Result() for chain in chains for way in ways if (way, chain) not in NOT_WITH
    }
    end = time.monotonic() + minutes * 60
    with folder_for(base) as folder:
        campaigns = {}
        for chain in chains:
            place = folder / re.sub(r"\W", "", chain)
            place.mkdir()
            campaigns[chain] = Campaign(place, chain, seed=seed)
        while True:
            for (way, chain), result in results.items():
                # A round with SIGKILL is short, so there are more of them.
                for _ in range(20 if way == "kill" else 1):
                    one = campaigns[chain].run(way)
                    for problem in one.problems[:20]:
                        print(f"PROBLEM {way}, {chain}, round {result.rounds}: {problem}")
                    result.add(one)
            done = sum(result.rounds for result in results.values())
            left = end - time.monotonic()
            print(f"... {done} rounds, {max(left, 0) / 60:.1f} minutes left", flush=True)
            if left <= 0:
                return results


def notices(name: str, way: str, base: Path | None = None, chain: str = "file") -> list[str]:
    """Run a mutant until it is noticed; returns what was noticed, [] for nothing."""
    with folder_for(base) as folder:
        source = mutants.make(name, folder)
        for attempt in range(ATTEMPTS):
            place = folder / str(attempt)
            place.mkdir()
            load = mutants.MUTANTS[name].load
            one = Campaign(place, chain, seed=attempt, source=source, load=load)
            problems = one.run(way).problems
            if problems:
                return problems
    return []


def main() -> int:
    """The command line; exit status 1 if anything was lost, or a mutant was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument("--only", default=",".join(WAYS), help="ways of looking, by comma")
    parser.add_argument("--chain", action="append", choices=CHAINS, help="only this chain")
    parser.add_argument("--seed", type=int, default=1, help="of the load (default: 1)")
    parser.add_argument("--folder", type=Path, help="where files are put (default: TMPDIR)")
    parser.add_argument("--mutants", action="store_true", help="see mutants being noticed")
    options = parser.parse_args()
    ways = [way for way in WAYS if way in options.only.split(",")]
    if "power" in ways or "raw" in ways:
        try:
            needs("mkfs.ext4")
        except pytest.skip.Exception as reason:
            parser.error(f"{reason}; or leave power and raw away: --only kill,order")
    if options.mutants:
        failed = False
        for name, mutant in mutants.MUTANTS.items():
            for way in ways:
                if way in mutant.seen_by:
                    problems = notices(name, way, options.folder)
                    failed = failed or not problems
                    print(
                        f"{name}: {way}: {problems[0] if problems else 'NOT NOTICED'}", flush=True
                    )
        return int(failed)
    chains = options.chain or list(CHAINS)
    results = campaign(ways, chains, options.minutes, options.seed, options.folder)
    total = Result()
    for (way, chain), result in results.items():
        print(f"{way:6} {chain:14} {result}")
        total.add(result)
    print(f"all    {total}")
    return int(bool(total.problems))


if __name__ == "__main__":
    sys.exit(main())
