"""From samples to a table: medians over the rounds, ratios to nbdkit round by round, the floors.

A ratio is formed inside one round, where both servers met the same machine a few seconds apart,
and only then is the median taken: what disturbs a whole round cancels out. Beside it stand the
smallest and the largest, so that a reader sees how far the number can be trusted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from servers import BASELINE, SUBJECT
from workloads import MIB, Sample


@dataclass(frozen=True)
class Record:
    """A sample and where it belongs."""

    kind: str
    workload: str
    server: str
    round: int
    sample: Sample
    in_mib: bool


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
    rate: Spread  # requests a second, or MiB/s
    in_mib: bool
    cpu_per_request: Spread  # seconds
    rate_ratio: Spread | None  # to nbdkit; None where no round has both
    cpu_ratio: Spread | None


# The least ratio to nbdkit in requests a second that pynbdkit is held to, and the greatest in CPU
# per request; both by the end of the row's name, and the kinds of disk that they hold for.
RATE_FLOORS: Mapping[str, float] = {
    "randread-4k-d1": 0.85,
    "randwrite-4k-d1": 0.85,
    "randread-4k-d16": 1.4,
    "randwrite-4k-d16": 1.3,
    "randread-4k-d64": 1.6,
    "randwrite-4k-d64": 1.3,
    "randread-4k-d16-x4": 1.8,
    "randwrite-4k-d16-x4": 1.8,
    "read-256k-d4": 1.0,
    "write-256k-d4": 1.2,
    "fua-4k-d16-dirty": 3.0,
}
SCRIPT_FLOOR = 2.5
TLS_FLOORS: Mapping[str, float] = {
    "randread-4k-d16": 1.0,
    "randwrite-4k-d16": 1.0,
    "read-256k-d4": 1.0,
    "write-256k-d4": 1.0,
}
CPU_CEILINGS: Mapping[str, float] = {"randread-4k-d16": 0.65, "randwrite-4k-d16": 0.65}
NATIVE_FLOORS: Mapping[str, float] = {
    "randread-4k-d16": 1.2,
    "randwrite-4k-d16": 1.2,
    "read-256k-d4": 1.0,
    "write-256k-d4": 1.0,
}


def rate_floor(kind: str, workload: str) -> float | None:
    """Return the ratio that pynbdkit has to reach there, if one is set."""
    if kind in ("tls", "native"):
        return (TLS_FLOORS if kind == "tls" else NATIVE_FLOORS).get(workload)
    return SCRIPT_FLOOR if kind == "script" else RATE_FLOORS.get(workload)


def cpu_ceiling(kind: str, workload: str) -> float | None:
    """Return the CPU ratio that pynbdkit may not exceed there, if one is set."""
    return None if kind in ("script", "tls", "native") else CPU_CEILINGS.get(workload)


def _shown_rate(record: Record) -> float:
    sample = record.sample
    return sample.nbytes / MIB / sample.seconds if record.in_mib else sample.rate


def rows(records: Iterable[Record]) -> list[Row]:
    """Gather records into rows, in the order of their first appearance, nbdkit's first."""
    grouped: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        servers = grouped.setdefault((record.kind, record.workload), {})
        servers.setdefault(record.server, []).append(record)
    result = []
    for (kind, workload), servers in grouped.items():
        base = {record.round: record.sample for record in servers.get(BASELINE, [])}
        for name in sorted(servers, key=lambda name: name != BASELINE):
            mine = servers[name]
            pairs = [(r.sample, base[r.round]) for r in mine if r.round in base]
            result.append(
                Row(
                    kind,
                    workload,
                    name,
                    len(mine),
                    Spread.of([_shown_rate(record) for record in mine]),
                    mine[0].in_mib,
                    Spread.of([record.sample.cpu_per_request for record in mine]),
                    Spread.of([one.rate / other.rate for one, other in pairs]) if pairs else None,
                    _cpu_ratio(pairs),
                )
            )
    return result


def _cpu_ratio(pairs: Sequence[tuple[Sample, Sample]]) -> Spread | None:
    ratios = [a.cpu_per_request / b.cpu_per_request for a, b in pairs if b.cpu > 0]
    return Spread.of(ratios) if ratios else None


def verdict(row: Row) -> str:
    """Say which limits hold for a row and whether its medians keep them; empty where none do."""
    if row.server != SUBJECT:
        return ""
    said = []
    floor = rate_floor(row.kind, row.workload)
    if floor is not None and row.rate_ratio:
        met = row.rate_ratio.median >= floor
        said.append(f"≥ {floor:g} {'ok' if met else 'MISSED'}")
    ceiling = cpu_ceiling(row.kind, row.workload)
    if ceiling is not None and row.cpu_ratio:
        met = row.cpu_ratio.median <= ceiling
        said.append(f"CPU ≤ {ceiling:g} {'ok' if met else 'MISSED'}")
    return ", ".join(said)


def missed(table: Iterable[Row]) -> list[str]:
    """Return the names of the rows of which a limit is missed."""
    return [f"{row.kind}/{row.workload}" for row in table if "MISSED" in verdict(row)]


HEADINGS = (
    "workload",
    "server",
    "rate",
    "ratio to nbdkit",
    "CPU a request",
    "CPU ratio",
    "floor",
)


def _cells(row: Row) -> tuple[str, ...]:
    rate = f"{row.rate.median:,.0f} MiB/s" if row.in_mib else f"{row.rate.median:,.0f}/s"
    same = row.server == BASELINE
    return (
        row.workload,
        row.server,
        rate,
        "1" if same else str(row.rate_ratio or "–"),  # noqa: RUF001
        f"{row.cpu_per_request.median * 1e6:.1f} µs",
        "1" if same else str(row.cpu_ratio or "–"),  # noqa: RUF001
        verdict(row),
    )


def table(table_rows: Sequence[Row]) -> str:
    """Return one markdown table for each kind of disk, its columns aligned for reading as text."""
    parts = []
    for kind in dict.fromkeys(row.kind for row in table_rows):
        lines = [HEADINGS, *(_cells(row) for row in table_rows if row.kind == kind)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
        text = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        text.insert(1, "| " + " | ".join("-" * width for width in widths))
        parts.append(f"### {kind}\n\n" + "\n".join(line + " |" for line in text))
    return "\n\n".join(parts)


def markdown(table_rows: Sequence[Row], facts: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """Return the whole report: what was measured on, the tables, what to know beside them."""
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    rest = "\n".join(f"- {note}" for note in notes)
    parts = [head, table(table_rows), rest]
    return "\n\n".join(part for part in parts if part) + "\n"
