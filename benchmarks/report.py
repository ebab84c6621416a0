"""From samples to a table: medians over the rounds, ratios to nbdkit round by round, the goals.

A ratio is formed inside one round, where both servers met the same machine a few seconds apart,
and only then is the median taken: what disturbs a whole round cancels out. Beside it stand the
smallest and the largest, so that a reader sees how far the number can be trusted. A ratio says how
many times better a server is: of rates it is one by the other, of costs the other by the one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from servers import BASELINE, REFERENCES, SUBJECT, baseline, program
from workloads import KIB, MIB, Sample

UNITS: Mapping[str, Callable[[Sample], float]] = {
    "/s": lambda sample: sample.rate,
    "MiB/s": lambda sample: sample.nbytes / MIB / sample.seconds,
    "ms": lambda sample: 1e3 / sample.rate,
    "KiB": lambda sample: sample.nbytes / KIB / sample.requests,
}
"""What a sample is worth in each unit of the table."""
COSTS = ("ms", "KiB")
"""Units of which less is better."""


@dataclass(frozen=True)
class Record:
    """A sample and where it belongs."""

    kind: str
    workload: str
    server: str
    round: int
    sample: Sample
    unit: str = "/s"

    @property
    def value(self) -> float:
        """What the table shows, in the unit."""
        return UNITS[self.unit](self.sample)

    def better(self, other: Record) -> float:
        """Return how many times better this is than another server's record."""
        mine, its = self.value, other.value
        return its / mine if self.unit in COSTS else mine / its


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"  # noqa: RUF001


@dataclass(frozen=True)
class Row:
    """One server's line for one workload."""

    kind: str
    workload: str
    server: str
    rounds: int
    value: Spread  # in the unit
    unit: str
    cpu_per_request: Spread  # seconds
    ratio: Spread | None  # to nbdkit, run in the same way; None where no round has both
    cpu_ratio: Spread | None
    references: Mapping[str, Spread] = field(default_factory=dict)  # ratios to other servers

    @property
    def name(self) -> str:
        """As in `--only` and in a goal."""
        return f"{self.kind}/{self.workload}/{self.server}"


@dataclass(frozen=True)
class Goal:
    """What pynbdkit is held to in some rows: their names (* allowed), and a limit for a measure.

    The measures are those of `MEASURES`. Of the goals for the ratio, a row's first one counts.
    """

    text: str
    rows: tuple[str, ...]
    limit: float
    measure: str = "ratio"

    def holds_for(self, row: Row) -> bool:
        return any(fnmatchcase(row.name, pattern) for pattern in self.rows)

    @property
    def ceiling(self) -> bool:
        """Whether the limit is what may not be exceeded (else what has to be reached)."""
        return self.measure in ("CPU", "starts of python")

    def met(self, value: float) -> bool:
        return value <= self.limit if self.ceiling else value >= self.limit

    def __str__(self) -> str:
        words = {"ratio": "", "CPU": "CPU ", "of limit": "of limit "}
        unit = {"rate": "/s", "starts of python": " starts of python"}.get(self.measure, "")
        sign = "≤" if self.ceiling else "≥"
        return f"{words.get(self.measure, '')}{sign} {self.limit:,g}{unit}"


def _reference(row: Row, name: str) -> float | None:
    found = row.references.get(name)
    return found.median if found else None


def _of_python(row: Row) -> float | None:
    found = _reference(row, "python")
    return 1 / found if found else None


MEASURES: Mapping[str, Callable[[Row], float | None]] = {
    "ratio": lambda row: row.ratio.median if row.ratio else None,
    "CPU": lambda row: row.cpu_ratio.median if row.cpu_ratio else None,
    "rate": lambda row: row.value.median,
    "of limit": lambda row: _reference(row, "limit"),
    "starts of python": _of_python,
}
"""How a row's number for a goal is found; None where it was not measured."""

SLOW_RATE = 14_400.0
"""Requests a second: 16 threads that wait 1 ms in each call give 16,000; a tenth may be lost."""


def _both(*workloads: str) -> tuple[str, ...]:
    return tuple(f"{kind}/{name}/pynbdkit" for name in workloads for kind in ("memory", "file"))


GOALS = (
    Goal("4 KiB, 16 and 64 in flight", _both("rand*-4k-d16", "rand*-4k-d64"), 1.8),
    Goal("4 KiB, four connections", _both("rand*-4k-d16-x4"), 2.5),
    Goal("4 KiB, one in flight", _both("rand*-4k-d1"), 1.0),
    Goal("256 KiB", _both("*-256k-d4"), 1.3),
    Goal("nbdcopy, both ways", _both("nbdcopy-*"), 1.2),
    Goal("TLS", ("tls/*/pynbdkit",), 1.2),
    Goal("script plugin", ("script/*/pynbdkit",), 3.0),
    Goal("plugin in C", ("native/*/pynbdkit",), 1.3),
    Goal("three filters", ("filters/*/pynbdkit",), 1.5),
    Goal("FUA writes, a dirty file behind them", ("file/fua-*-dirty/pynbdkit",), 5.0),
    Goal("CPU a request, 16 in flight", _both("rand*-4k-d16"), 0.5, "CPU"),
    Goal("calls of 1 ms, 16 threads", ("slow/*-d64/pynbdkit",), SLOW_RATE, "rate"),
    Goal("a start", ("start/*/pynbdkit",), 3.0, "starts of python"),
    Goal("of what a client can draw", ("memory/*/pynbdkit",), 0.95, "of limit"),
    Goal("--workers 2, four connections", ("*-workers/*/pynbdkit-workers",), 1.0),
    Goal("coroutines, calls of 10 ms", ("async/*/pynbdkit",), 1.0),
    Goal("memory of an idle connection", ("idle/*/pynbdkit",), 1.0),
    Goal("every other row", ("[!s]*/*/pynbdkit*", "s[!t]*/*/pynbdkit*"), 1.0),
)
"""What is set for this machine; nothing is compared with nbdkit's start, a program in C."""


def goals(row: Row) -> list[Goal]:
    """Return the goals that hold for a row."""
    if program(row.server) != SUBJECT:
        return []
    found = [goal for goal in GOALS if goal.holds_for(row)]
    ratios = [goal for goal in found if goal.measure == "ratio"]
    return [goal for goal in found if goal not in ratios[1:]]


def rows(records: Iterable[Record]) -> list[Row]:
    """Gather records into rows, in the order of their first appearance, nbdkit's first."""
    grouped: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        servers = grouped.setdefault((record.kind, record.workload), {})
        servers.setdefault(record.server, []).append(record)
    result = []
    for (kind, workload), servers in grouped.items():
        for name in sorted(servers, key=lambda name: name != BASELINE):
            mine = servers[name]
            pairs = _pairs(mine, servers.get(baseline(kind, name), []))
            wanted = REFERENCES.get(kind, ()) if program(name) == SUBJECT else ()
            references = {
                other: Spread.of([a.better(b) for a, b in found])
                for other in wanted
                if other != name and (found := _pairs(mine, servers.get(other, [])))
            }
            result.append(
                Row(
                    kind,
                    workload,
                    name,
                    len(mine),
                    Spread.of([record.value for record in mine]),
                    mine[0].unit,
                    Spread.of([record.sample.cpu_per_request for record in mine]),
                    Spread.of([a.better(b) for a, b in pairs]) if pairs else None,
                    _cpu_ratio(pairs),
                    references,
                )
            )
    return result


def _pairs(mine: Sequence[Record], others: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return what two servers gave in the same round."""
    rounds = {record.round: record for record in others}
    return [(record, rounds[record.round]) for record in mine if record.round in rounds]


def _cpu_ratio(pairs: Sequence[tuple[Record, Record]]) -> Spread | None:
    samples = [(a.sample, b.sample) for a, b in pairs]
    ratios = [a.cpu_per_request / b.cpu_per_request for a, b in samples if a.cpu > 0 < b.cpu]
    return Spread.of(ratios) if ratios else None


def verdict(row: Row) -> str:
    """Say which limits hold for a row and whether its medians keep them; empty where none do."""
    said = []
    for goal in goals(row):
        value = MEASURES[goal.measure](row)
        if value is not None:
            said.append(f"{goal} {'ok' if goal.met(value) else 'MISSED'}")
    return ", ".join(said)


def missed(table: Iterable[Row]) -> list[str]:
    """Return the names of the rows of which a limit is missed."""
    behind = (row for row in table if "MISSED" in verdict(row))
    return [row.name.removesuffix(f"/{SUBJECT}") for row in behind]


SUMMARY = ("goal", "limit", "worst", "best", "of what limit.c gives", "")


def summary(table_rows: Sequence[Row], everything: bool = True) -> str:
    """Return a table of one line for each goal, the worst and the best row of it.

    With `everything`, a goal of which no row was measured has its line, too.
    """
    lines = [SUMMARY]
    for goal in GOALS:
        found = [row for row in table_rows if goal in goals(row)]
        values = {row.name: v for row in found if (v := MEASURES[goal.measure](row)) is not None}
        if not values:
            if everything:
                lines.append((goal.text, str(goal), "", "", "", "not measured"))
            continue
        behind = sum(not goal.met(v) for v in values.values())
        worst, best = (choose(values.values()) for choose in (min, max))
        if goal.ceiling:
            worst, best = best, worst
        of_limit = [share for row in found if (share := _reference(row, "limit")) is not None]
        shown = "{:,.0f}" if goal.measure == "rate" else "{:.2f}"
        lines.append(
            (
                goal.text,
                str(goal),
                shown.format(worst),
                shown.format(best),
                f"{min(of_limit):.2f}–{max(of_limit):.2f}" if of_limit else "",  # noqa: RUF001
                f"MISSED by {behind} of {len(values)}" if behind else "met",
            )
        )
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a markdown table, its columns aligned for reading as text."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths))
    return "\n".join(line + " |" for line in text)


HEADINGS = ("ratio to nbdkit", "CPU a request", "CPU ratio")
DASH = "–"  # noqa: RUF001


def shown(value: float, unit: str) -> str:
    """Return a number with its unit, as the table has it."""
    return f"{value:,.0f}/s" if unit == "/s" else f"{value:,.{1 if unit in COSTS else 0}f} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    same = baseline(row.kind, row.server) == row.server
    cpu = row.cpu_per_request.median * 1e6
    return (
        row.workload,
        row.server,
        shown(row.value.median, row.unit),
        "1" if same else str(row.ratio or DASH),
        f"{cpu:,.1f} µs" if cpu else DASH,
        "1" if same and cpu else str(row.cpu_ratio or DASH),
        *(str(row.references.get(name, "")) for name in REFERENCES.get(row.kind, ())),
        verdict(row),
    )


def table(table_rows: Sequence[Row]) -> str:
    """Return one markdown table for each kind of disk."""
    parts = []
    for kind in dict.fromkeys(row.kind for row in table_rows):
        mine = [row for row in table_rows if row.kind == kind]
        what = "cost" if mine[0].unit in COSTS else "rate"
        more = (f"ratio to {name}" for name in REFERENCES.get(kind, ()))
        lines = [("workload", "server", what, *HEADINGS, *more, "floor")]
        lines += [_cells(row) for row in mine]
        parts.append(f"### {kind}\n\n{_aligned(lines)}")
    return "\n\n".join(parts)


def markdown(
    table_rows: Sequence[Row],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    everything: bool = True,
) -> str:
    """Return the report: what was measured on, the goals, the tables, what to know beside them."""
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    rest = "\n".join(f"- {note}" for note in notes)
    parts = [head]
    if any(goals(row) for row in table_rows):
        parts.append(f"### goals\n\n{summary(table_rows, everything)}")
    parts += [table(table_rows), rest]
    return "\n\n".join(part for part in parts if part) + "\n"
