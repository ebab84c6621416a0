#!/usr/bin/env python3
"""How cost grows, beside nbdkit: measure the curves of docs/curves.md and draw them.

`make bench-plots`. Each curve varies one thing; at each value, the servers take turns at the same
load, and the median of the rounds counts. The numbers go to one JSON file, the drawings are made
from that file alone (draw.py, with matplotlib), so they can be drawn again without measuring.

Exit status: 0 when everything was measured and drawn; 1 when something was not; 2 for wrong
options.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
import machine
import servers
import workloads
from servers import HERE, SLOW_ASYNC, SLOW_THREADS, Place, Server
from workloads import KIB, MIB, Crowd, Fio, Sample

FOLDER = HERE.parent / "docs" / "plots"
DATA = "curves.json"
DISK = 256 * MIB
FULL = (2, 1.0)  # rounds, seconds a point
QUICK = (1, 0.15)
FAIRLY = 4
"""Requests in flight where something else is varied: client and server both have work."""
CALL = 0.01
"""Seconds that each call of the slow disks takes."""


@dataclass(frozen=True)
class Line:
    """One line of a drawing: a program, and what sets it apart from the program's other lines."""

    server: str
    what: str

    def __str__(self) -> str:
        return f"{self.server}, {self.what}"


READS = tuple(Line(server, "read") for server in ("nbdkit", "pynbdkit"))
WRITES = tuple(Line(server, "write") for server in ("nbdkit", "pynbdkit"))
THREADS = tuple(
    Line(server, f"{count} threads") for count in (16, 64) for server in ("nbdkit", "pynbdkit")
)


@dataclass(frozen=True)
class Curve:
    """What is varied, over which values, by which lines; `serve` and `load` say how.

    `serve` answers the options and the plugin of a line at a value, `load` what fio does then.
    """

    name: str
    title: str
    x: str
    values: tuple[int, ...]
    lines: tuple[Line, ...]
    serve: Callable[[Line, int], list[str]]
    load: Callable[[Line, int], Fio]
    filled: bool = True
    log: tuple[bool, bool] = (True, True)
    """Whether the axes, x and y, are logarithmic."""
    sizes: bool = False
    """Whether the values are bytes."""


def _memory(line: Line, value: int) -> list[str]:
    return ["memory", str(DISK)]


def _random(line: Line, block: int, depth: int) -> Fio:
    return Fio(str(line), "randwrite" if line.what == "write" else "randread", block, depth)


def _slow(line: Line, value: int) -> list[str]:
    words = [f"delay={CALL:g}", "size=64M"]
    if line.what == "coroutines":
        return [str(SLOW_ASYNC), *words]
    return ["-t", line.what.split()[0], "python", str(SLOW_THREADS), *words]


CURVES = (
    Curve(
        "depth",
        "4 KiB at random places, by requests in flight",
        "requests in flight",
        tuple(1 << n for n in range(9)),
        (*READS, *WRITES),
        _memory,
        lambda line, value: _random(line, 4 * KIB, value),
    ),
    Curve(
        "size",
        "four requests in flight, by their size",
        "size of a request",
        tuple(512 << n for n in range(0, 17, 2)),
        (*READS, *WRITES),
        _memory,
        lambda line, value: _random(line, value, FAIRLY),
        sizes=True,
    ),
    Curve(
        "connections",
        "4 KiB at random places, four in flight on each connection, by connections",
        "connections",
        tuple(1 << n for n in range(9)),
        (*READS, *WRITES),
        _memory,
        lambda line, value: Crowd(line.what, f"rand{line.what}", 4 * KIB, FAIRLY, value),
    ),
    Curve(
        "filters",
        "4 KiB at random places, 16 in flight, by filters that pass everything on",
        "filters (nofilter)",
        (0, 1, 2, 3, 4, 6, 8),
        (*READS, *WRITES),
        lambda line, value: [*["--filter=nofilter"] * value, *_memory(line, value)],
        lambda line, value: _random(line, 4 * KIB, 16),
        log=(False, False),
    ),
    Curve(
        "export",
        "4 KiB from random places of an empty disk, 16 in flight, by its size",
        "size of the disk",
        # 8 EiB is what no signed number of 64 bits holds: nearly.
        (*(1 << n for n in range(20, 63, 6)), (1 << 63) - 512),
        READS,
        lambda line, value: ["memory", str(value)],
        lambda line, value: _random(line, 4 * KIB, 16),
        filled=False,
        log=(True, False),
        sizes=True,
    ),
    Curve(
        "async",
        "calls that take 10 ms, by requests in flight",
        "requests in flight",
        tuple(1 << n for n in range(0, 11, 2)),
        (*THREADS, Line("pynbdkit", "coroutines")),
        _slow,
        lambda line, value: _random(line, 4 * KIB, value),
        filled=False,
    ),
)


def point(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return requests a second and CPU microseconds a request: the medians, to four digits."""
    rate = statistics.median(sample.rate for sample in samples)
    cpu = statistics.median(sample.cpu_per_request for sample in samples) * 1e6
    return float(f"{rate:.4g}"), float(f"{cpu:.4g}")


class Measuring:
    """Runs curves; what fails is a line in `failures`, and no point."""

    def __init__(self, place: Place, rounds: int, seconds: float, say: Callable[[str], None]):
        self.place = place
        self.rounds = rounds
        self.seconds = seconds
        self.say = say
        self.failures: list[str] = []

    def run(self, curve: Curve, values: Sequence[int]) -> list[dict[str, Any]]:
        """Return each line with its points: value, requests a second, CPU µs a request."""
        samples: dict[tuple[Line, int], list[Sample]] = {}
        for number in range(1, self.rounds + 1):
            self.say(f"{curve.name}: round {number} of {self.rounds}")
            with contextlib.ExitStack() as stack:
                running: dict[tuple[str, ...], Server] = {}
                for value in values:
                    for line in curve.lines:
                        sample = self._sample(curve, line, value, running, stack)
                        if sample is not None:
                            samples.setdefault((line, value), []).append(sample)
        result = []
        for line in curve.lines:
            points = [(v, *point(samples[line, v])) for v in values if (line, v) in samples]
            result.append({"server": line.server, "what": line.what, "points": points})
        return result

    def _sample(
        self,
        curve: Curve,
        line: Line,
        value: int,
        running: dict[tuple[str, ...], Server],
        stack: contextlib.ExitStack,
    ) -> Sample | None:
        served = curve.serve(line, value)
        key = (line.server, *served)
        try:
            if key not in running:
                kind = f"{curve.name}{len(running)}"
                server = Server(line.server, kind, self.place, served=served)
                running[key] = stack.enter_context(server)
                if curve.filled:
                    workloads.fill(server, self.place)
            return curve.load(line, value).run(running[key], self.place, self.seconds)
        except (servers.ServerError, workloads.WorkloadError, OSError) as error:
            self.failures.append(f"{curve.name}, {line}, {value}: {error}")
            self.say(f"FAILED  {self.failures[-1]}")
            if key in running:
                running.pop(key).stop()  # it may be in any state
            return None


def few(values: Sequence[int]) -> tuple[int, ...]:
    """Return the first, the middle and the last."""
    return tuple(dict.fromkeys((values[0], values[len(values) // 2], values[-1])))


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves of both, the new ones where both have one, in the order of `CURVES`."""
    found = {**old, **new}
    return {curve.name: found[curve.name] for curve in CURVES if curve.name in found}


def written(curves: Mapping[str, Any]) -> str:
    """Return the file's text: JSON with a line for each line of a drawing."""
    parts = []
    for name, curve in curves.items():
        lines = ",\n".join(f"   {json.dumps(line)}" for line in curve["lines"])
        facts = json.dumps(curve["facts"], ensure_ascii=False)
        parts.append(f' "{name}": {{"facts": {facts},\n  "lines": [\n{lines}]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


@contextlib.contextmanager
def prepared(pynbdkit: Sequence[str]) -> Iterator[Place]:
    """Make what servers and clients need; remove it afterwards. Nothing is served from a disk."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        place = Place(Path(folder), Path(folder) / "disk.img", DISK, pynbdkit)
        bench.write_random(workloads.source_file(place), DISK)
        yield place


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plots.py", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    names = [curve.name for curve in CURVES]
    add("--quick", action="store_true", help="three short points of each line: some two minutes")
    help_ = f"only this curve (may be repeated): {', '.join(names)}"
    add("--only", action="append", default=[], choices=names, metavar="CURVE", help=help_)
    add("--draw", action="store_true", help=f"draw what {DATA} has, without measuring")
    add("--rounds", type=int, metavar="N", help=f"rounds (default {FULL[0]}; quick {QUICK[0]})")
    help_ = f"length of each point (default {FULL[1]:g}; quick {QUICK[1]:g})"
    add("--seconds", type=float, metavar="S", help=help_)
    help_ = "where data and drawings go (default docs/plots)"
    add("--dir", type=Path, default=FOLDER, metavar="DIR", help=help_)
    help_ = "how pynbdkit is started (default: by this Python, -m pynbdkit)"
    add("--pynbdkit", default=shlex.join(Place.pynbdkit), metavar="COMMAND", help=help_)
    args = parser.parse_args(argv)
    rounds, seconds = QUICK if args.quick else FULL
    args.rounds = rounds if args.rounds is None else args.rounds
    args.seconds = seconds if args.seconds is None else args.seconds
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds must be 1 at least, --seconds above 0")
    args.pynbdkit = shlex.split(args.pynbdkit)
    return args


def measured(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """Measure the curves that were asked for; return them, and whether nothing failed."""
    found: dict[str, Any] = {}
    with prepared(args.pynbdkit) as place:
        measuring = Measuring(place, args.rounds, args.seconds, say)
        commands = bench.version_commands({"nbdkit", "pynbdkit"}, args.pynbdkit)
        facts = machine.facts(commands, args.dir)
        facts["runs"] = f"{args.rounds} rounds of {args.seconds:g} s a point"
        for curve in CURVES:
            if not args.only or curve.name in args.only:
                values = few(curve.values) if args.quick else curve.values
                found[curve.name] = {"facts": facts, "lines": measuring.run(curve, values)}
    return found, not measuring.failures


def main(argv: Sequence[str] | None = None) -> int:
    args = options(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    lines = []
    if importlib.util.find_spec("matplotlib") is None:
        lines.append("matplotlib is not installed: pip install -e '.[plots]' (make bench-plots)")
    if not args.draw:
        place = Place(Path(), Path(), DISK, args.pynbdkit)
        gaps = [servers.missing(name, place) for name in ("nbdkit", "pynbdkit")]
        lines += [gap for gap in gaps if gap]
        lines += bench.missing_clients()
    path = args.dir / DATA
    if args.draw and not path.exists():
        lines.append(f"{path} is not there: measure first, without --draw")
    if lines:
        for line in lines:
            say(f"plots: {line}")
        return 1

    args.dir.mkdir(parents=True, exist_ok=True)
    curves: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    whole = True
    if not args.draw:
        found, whole = measured(args, say)
        curves = merged(curves, found)
        path.write_text(written(curves))
    import draw

    for curve in CURVES:
        if curve.name in curves and (not args.only or curve.name in args.only):
            file = args.dir / f"{curve.name}.svg"
            file.write_text(draw.svg(curve, curves[curve.name]))
            say(f"{file.name}: {file.stat().st_size / KIB:.0f} KiB")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
