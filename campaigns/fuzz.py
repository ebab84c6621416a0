#!/usr/bin/env python3
"""Give the parsers and machines millions of bad inputs, and look at what they make of them.

    make fuzz                                  two million inputs, a table at the end
    python campaigns/fuzz.py [TARGET ...]      --inputs N, --jobs N, --seed N, --random, --list
    python campaigns/fuzz.py --mutants         broken copies of the package: are they found?
    python campaigns/fuzz.py --try HEX TARGET  one input, with the traceback if it is a finding

Each target runs in a process of its own, driven by atheris: inputs that reach new code are kept
and changed further (``--random``: without it, by chance alone). What a target is, and how it knows
right from wrong, tells fuzz_base.py; the targets are in the modules fuzz_*.py.

Promised: no finding, no input that takes over 10 seconds, no growth of memory. The table has the
rate, the memory at the start and the end, and how many lines of the modules that a target is about
were reached by what it has kept. Exit status: 0 promises kept, 1 broken, 2 wrong options, or no
atheris.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

import fuzz_mutants
from fuzz_base import Finding, Target, attempt, try_at_random

TARGETS = {
    "handshake": ("fuzz_handshake", "Handshake"),
    "requests": ("fuzz_requests", "Requests"),
    "workers": ("fuzz_requests", "Workers"),
    "connection": ("fuzz_connection", "Connections"),
    "client": ("fuzz_client", "Client"),
    "replies": ("fuzz_client", "Replies"),
    "payloads": ("fuzz_text", "Payloads"),
    "uri": ("fuzz_text", "Uris"),
    "words": ("fuzz_text", "Words"),
    "command-line": ("fuzz_text", "CommandLine"),
    "keys": ("fuzz_text", "Keys"),
    "data": ("fuzz_text", "Data"),
    "tls": ("fuzz_tls", "Tls"),
}
INPUTS = 2_000_000
SLOW = 10
"""Seconds after which an input is a hang."""
WARM = 10
"""After one of so many inputs memory is measured first: caches are full then."""
GROWTH = 32
"""MiB that a target may grow; atheris keeps its corpus and counters in the same process."""


def load(name: str) -> Target:
    """A target by its name."""
    module, kind = TARGETS[name]
    target: Target = getattr(importlib.import_module(module), kind)()
    return target


def rss() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- in the target's process -----------------------------------------------------------------------


class Counted:
    """Counts inputs, and writes down now and then how it stands: nothing runs at the end."""

    def __init__(self, target: Target, inputs: int, status: Path) -> None:
        self._target = target
        self._inputs = inputs
        self._status = status
        self._warm = max(inputs // WARM, 1)
        self._count = 0
        self._start = time.monotonic()
        self._first = 0

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        self._count += 1
        if self._count == self._warm:
            gc.collect()
            self._first = rss()
        attempt(self._target, data)
        if self._count % 1000 == 0 or self._count == self._inputs:
            self.write()

    def write(self) -> None:
        """Write down how it stands."""
        gc.collect()
        seconds = time.monotonic() - self._start
        state = {"count": self._count, "seconds": seconds, "first": self._first, "last": rss()}
        self._status.write_text(json.dumps(state))


def by_coverage(name: str, inputs: int, seed: int, folder: Path) -> None:
    """Run a target under atheris; does not return."""
    import atheris

    with atheris.instrument_imports(include=["pynbdkit"]):
        target = load(name)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds().values()):
        (corpus / f"seed-{number}").write_bytes(data)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        if seed & 3 == 0:
            return bytes(atheris.Mutate(data, longest))
        return target.mutate(bytes(data), Random(seed))[:longest]

    words = [
        *("fuzz", f"-runs={inputs}", f"-seed={seed}", f"-timeout={SLOW}"),
        *(
            f"-max_len={target.longest}",
            f"-artifact_prefix={folder}/found-",
            "-rss_limit_mb=1024",
            "-verbosity=0",
            str(corpus),
        ),
    ]
    counted = Counted(target, inputs, folder / "status")
    atheris.Setup(words, counted, custom_mutator=mutate)
    atheris.Fuzz()


def by_chance(name: str, inputs: int, seed: int, folder: Path) -> None:
    """Run a target without atheris."""
    target = load(name)
    counted = Counted(target, inputs, folder / "status")

    def hang(signum: int, frame: FrameType | None) -> None:
        raise Finding(f"no end after {SLOW} seconds")

    signal.signal(signal.SIGALRM, hang)
    for done in range(0, inputs, 1000):
        signal.alarm(SLOW * 10)
        try_at_random(_Each(target, counted), min(1000, inputs - done), seed + done)
    signal.alarm(0)


class _Each(Target):
    """A target whose inputs are counted."""

    def __init__(self, target: Target, counted: Counted) -> None:
        self.name = target.name
        self.one = counted  # type: ignore[method-assign]
        self.mutate = target.mutate  # type: ignore[method-assign]
        self.seeds = target.seeds  # type: ignore[method-assign]


def functions(code: CodeType) -> set[int]:
    """The lines of all functions in a module's code, without what runs when it is imported."""
    lines: set[int] = set()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & 1:  # a function's, not a class's
                lines |= {line for _, _, line in inner.co_lines() if line}
                lines.discard(inner.co_firstlineno)
            lines |= functions(inner)
    return lines


def reached(name: str, folder: Path) -> dict[str, tuple[int, int]]:
    """How many lines of each module the seeds and the corpus reach, and how many there are."""
    target = load(name)
    seen: dict[str, set[int]] = {}
    for module in target.modules:
        file = importlib.import_module(module).__file__
        assert file is not None
        seen[file] = set()

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        lines = seen.get(frame.f_code.co_filename)
        return None if lines is None else local

    inputs = list(target.seeds().values())
    if (folder / "corpus").exists():
        inputs += [file.read_bytes() for file in sorted((folder / "corpus").iterdir())]
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        for data in inputs:
            target.one(data)
    finally:
        sys.settrace(None)
    result = {}
    for module, (file, lines) in zip(target.modules, seen.items(), strict=True):
        all_lines = functions(compile(Path(file).read_text(), file, "exec"))
        result[module.removeprefix("pynbdkit.")] = (len(lines & all_lines), len(all_lines))
    return result


# -- in the process that was called ----------------------------------------------------------------


@dataclass
class Run:
    """A target that runs, or has run."""

    name: str
    inputs: int
    folder: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, name: str, inputs: int, seed: int, chance: bool, root: Path) -> Run:
        """Start it."""
        folder = root / name
        folder.mkdir()
        words = [sys.executable, __file__, "--child", str(folder), "--inputs", str(inputs)]
        words += ["--seed", str(seed), *(["--random"] if chance else []), name]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return cls(name, inputs, folder, process)

    def report(self) -> tuple[list[str], list[str]]:
        """The cells of the table, and what is broken."""
        broken = []
        log = (self.folder / "log").read_text(errors="replace")
        if self.process.returncode:
            broken.append(f"{self.name}: {_ending(log)}")
            for file in self.folder.glob("found-*"):
                broken.append(f"  to keep: what it was = {file.read_bytes().hex()}")
        try:
            state = json.loads((self.folder / "status").read_text())
        except (OSError, ValueError):
            return [self.name, "0", "", "", "", ""], [*broken, f"{self.name}: nothing was tried"]
        count, seconds = state["count"], state["seconds"]
        first, last = state["first"] / 2**20, state["last"] / 2**20
        if not self.process.returncode and count < self.inputs:
            broken.append(f"{self.name}: {count} inputs of {self.inputs} were tried")
        if last - first > GROWTH:
            broken.append(f"{self.name}: memory has grown from {first:.0f} to {last:.0f} MiB")
        lines = ""
        if not broken:
            words = [sys.executable, __file__, "--cover", str(self.folder), self.name]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                broken.append(f"{self.name}: {_ending(done.stderr)}")
            else:
                found = json.loads(done.stdout).items()
                lines = ", ".join(f"{name} {hit}/{of}" for name, (hit, of) in found)
        memory = f"{first:.0f} → {last:.0f}"
        return [
            *(self.name, f"{count:,}", f"{seconds:.0f}", f"{count / seconds:,.0f}", memory, lines),
        ], broken


def _ending(log: str) -> str:
    """The end of a log, from the last traceback on."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if "Finding" in line]
    return "\n".join(lines[starts[-1] : starts[-1] + 6] if starts else lines[-12:])


def campaign(names: Sequence[str], inputs: int, seed: int, jobs: int, chance: bool) -> int:
    """Run targets, `jobs` at a time; print the table. Returns the exit status."""
    shares = {name: load(name).share for name in names}
    whole = sum(shares.values())
    waiting = sorted(names, key=lambda name: shares[name] if name != "tls" else 99)
    running: list[Run] = []
    rows = []
    broken: list[str] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                count = max(round(inputs * shares[name] / whole), 100)
                running.append(Run.start(name, count, seed, chance, Path(root)))
            time.sleep(0.1)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                cells, found = run.report()
                rows.append(cells)
                broken += found
                print(f"{cells[0]}: {cells[1]} inputs", file=sys.stderr, flush=True)
    print("| target | inputs | seconds | inputs/s | MiB | lines reached |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for cells in sorted(rows, key=lambda cells: list(TARGETS).index(cells[0])):
        print(f"| {' | '.join(cells)} |")
    total = sum(int(cells[1].replace(",", "")) for cells in rows)
    print(f"\n{total:,} inputs in {time.monotonic() - begin:.0f} s, {jobs} at a time, seed {seed}")
    for text in broken:
        print(f"BROKEN: {text}", file=sys.stderr)
    return 1 if broken else 0


def notices(name: str, folder: Path, seed: int, inputs: int = 100_000) -> str:
    """Whether a mutant is found, by chance alone: "" if it is not, else after how long."""
    tree = fuzz_mutants.make(name, folder)
    return found_in(tree, fuzz_mutants.MUTANTS[name].target, seed, inputs)


def found_in(tree: Path, target: str, seed: int, inputs: int) -> str:
    """Whether a target finds something in a source tree: "" if it does not, else after how long."""
    words = [sys.executable, __file__, "--random", "--jobs", "1", "--inputs", str(inputs)]
    path = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    begin = time.monotonic()
    done = subprocess.run(
        [*words, "--seed", str(seed), target], env=path, capture_output=True, text=True
    )
    if done.returncode != 1 or "  input: " not in done.stderr:
        return ""
    return f"{time.monotonic() - begin:.1f} s"


def mutants(seed: int) -> int:
    """Look whether each mutant is found; print a table. Returns the exit status.

    What is found has to be the mutant: so the package as it is comes first.
    """
    print("| broken promise | target | found after |")
    print("| --- | --- | ---: |")
    wrong = 0
    for target in sorted({mutant.target for mutant in fuzz_mutants.MUTANTS.values()}):
        after = found_in(fuzz_mutants.SOURCE, target, seed, 5000)
        wrong += bool(after)
        print(f"| none | {target} | {f'FOUND: {after}' if after else 'nothing'} |", flush=True)
    for name, mutant in fuzz_mutants.MUTANTS.items():
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            after = notices(name, Path(folder), seed)
        wrong += not after
        print(f"| {name} | {mutant.target} | {after or 'NOT FOUND'} |", flush=True)
    return 1 if wrong else 0


def _try(name: str, digits: str) -> int:
    try:
        load(name).one(bytes.fromhex(digits))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=INPUTS, help="in all (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other inputs")
    parser.add_argument("--random", action="store_true", help="without atheris")
    parser.add_argument("--mutants", action="store_true", help="is a broken server found?")
    parser.add_argument("--list", action="store_true", help="print the targets, and exit")
    parser.add_argument("--try", dest="digits", metavar="HEX", help="try this one input")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cover", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    names = options.targets or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            parser.error(f"unknown target {name!r} (there are {', '.join(TARGETS)})")
    if options.list:
        print("\n".join(names))
        return 0
    if options.mutants:
        return mutants(options.seed)
    if options.child:
        run = by_chance if options.random else by_coverage
        run(names[0], options.inputs, options.seed, options.child)
        return 0
    if options.cover:
        print(json.dumps(reached(names[0], options.cover)))
        return 0
    if options.digits is not None:
        return _try(names[0], options.digits)
    if not options.random and importlib.util.find_spec("atheris") is None:
        version = ".".join(map(str, sys.version_info[:2]))
        print(
            f"atheris is not installed for Python {version}: pip install -e '.[fuzz]', or --random",
            file=sys.stderr,
        )
        return 2
    return campaign(names, options.inputs, options.seed, options.jobs, options.random)


if __name__ == "__main__":
    sys.exit(main())
