"""The ledger of a disk's writers: what they sent, what was answered, and what must be there now.

Each sector that is written says whose it is: the serial number of its write and its own place, over
and over, so that a sector made of two writes shows. Requests may overlap and be in flight together;
which of two such is last is nobody's promise. What may be in a sector follows from three times of
each request: when it was sent, answered, and promised (made stable):

    a request's content may be gone if and only if one that was sent after its answer is promised.

A request with FUA is promised when it is answered; any other one when a flush is answered that was
sent after its own answer, on whatever connection (the export says that it can multi-conn).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SECTOR = 512
PIECE = struct.Struct(">8sQQQ")
"""What a sector repeats: a mark, the write's serial number, the sector's number, both mixed."""
MARK = b"\xfasector\xfb"
MIX = 0x9E3779B97F4A7C15
ZEROS = bytes(SECTOR)
WRITE, ZERO, TRIM = "write", "zero", "trim"
MOST_PROBLEMS = 20
"""After so many, more of them say nothing new."""


@dataclass(slots=True)
class Entry:
    """One request that changes sectors [first, end); times are nanoseconds, 0 for not yet."""

    serial: int
    kind: str
    fua: bool
    first: int
    end: int
    sent: int
    answered: int = 0
    promised: int = 0

    def __str__(self) -> str:
        return f"#{self.serial} {self.kind}{', fua' * self.fua}"


def payload(serial: int, first: int, end: int) -> bytearray:
    """What write number `serial` puts into sectors [first, end)."""
    content = bytearray()
    for sector in range(first, end):
        mixed = (serial * MIX ^ sector) & (2**64 - 1)
        content += PIECE.pack(MARK, serial, sector, mixed) * (SECTOR // PIECE.size)
    return content


class Ledger:
    """The book of one disk. Rounds follow one another on it: see `rebase`."""

    def __init__(self, content: bytes, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`content`: what is on the disk, and stable, before the first request."""
        self.base = content
        self.entries: list[Entry] = []
        self.serial = 0
        self.flushes = 0
        self._clock = clock
        self._touched: dict[int, list[Entry]] = {}
        self._unstable: list[Entry] = []

    # -- what happens ----------------------------------------------------------------------------

    def send(self, kind: str, fua: bool, first: int, end: int) -> Entry:
        """A request is about to be sent."""
        self.serial += 1
        entry = Entry(self.serial, kind, fua, first, end, self._clock())
        self.entries.append(entry)
        for sector in range(first, end):
            self._touched.setdefault(sector, []).append(entry)
        return entry

    def answer(self, entry: Entry) -> None:
        """It was answered, without an error."""
        entry.answered = self._clock()
        if entry.fua:
            entry.promised = entry.answered
        else:
            self._unstable.append(entry)

    def flush(self) -> int:
        """A flush is about to be sent; returns what `flushed` is to be told."""
        return self._clock()

    def flushed(self, sent: int) -> None:
        """The flush that was sent then was answered, without an error."""
        now = self._clock()
        self.flushes += 1
        rest = []
        for entry in self._unstable:
            if entry.answered < sent:
                entry.promised = now
            else:
                rest.append(entry)
        self._unstable = rest

    # -- what must be there ----------------------------------------------------------------------

    @property
    def answered(self) -> list[Entry]:
        """The requests of this round that were answered."""
        return [entry for entry in self.entries if entry.answered]

    @property
    def promised(self) -> list[Entry]:
        """The requests of this round that are promised."""
        return [entry for entry in self.entries if entry.promised]

    def check(self, found: bytes, at: int = 0, *, power: bool = True) -> list[str]:
        """What is wrong with the content that was found, each in a line.

        at: when the server, or the machine, ended (0: after all of this). power: whether power
        failed, so that only what is promised has to be there; else all that is answered must.
        """
        if len(found) != len(self.base):
            return [f"the disk has {len(found)} bytes instead of {len(self.base)}"]
        problems: dict[str, list[int]] = {}
        for sector in self._different(found):
            entries = [
                entry for entry in self._touched.get(sector, ()) if not at or entry.sent <= at
            ]
            content = found[sector * SECTOR : (sector + 1) * SECTOR]
            wrong = self._judge(sector, content, entries, at or 2**63, power)
            if wrong:
                problems.setdefault(wrong, []).append(sector)
                if len(problems) == MOST_PROBLEMS:
                    break
        return [f"sector {_shown(sectors)}: {wrong}" for wrong, sectors in problems.items()]

    def _different(self, found: bytes) -> Iterable[int]:
        """The sectors to look at: those that requests touched, and any other one that differs."""
        sectors = set(self._touched)
        step = 256 * SECTOR
        for start in range(0, len(found), step):
            if found[start : start + step] != self.base[start : start + step]:
                sectors.update(range(start // SECTOR, min(start + step, len(found)) // SECTOR))
        return sorted(sectors)

    def _judge(
        self, sector: int, found: bytes, entries: list[Entry], at: int, power: bool
    ) -> str | None:
        bound = 0
        for entry in entries:
            kept = entry.promised if power else entry.answered
            if 0 < kept <= at:
                bound = max(bound, entry.sent)
        possible = [e for e in entries if not 0 < e.answered <= at or e.answered >= bound]
        last = next((str(e) for e in entries if e.sent == bound), "what was there")
        before = self.base[sector * SECTOR : (sector + 1) * SECTOR]
        if not bound and found == before:
            return None
        if found == ZEROS:
            if any(entry.kind != WRITE for entry in possible):
                return None
            return f"zeros, but {last} has to be there"
        serials = _serials(found, sector)
        if None not in serials:
            allowed = {entry.serial for entry in possible if entry.kind == WRITE}
            if serials <= allowed and (len(serials) == 1 or self._in_flight(possible, at)):
                return None
            if len(serials) > 1:
                return f"torn, of writes {sorted(filter(None, serials))}"
            (serial,) = serials
            known = next((entry for entry in entries if entry.serial == serial), None)
            if known is not None:
                return f"{known} is there, but {last} is newer"
            if found == before:
                return f"what was there before is back, but {last} is newer"
            return f"write #{serial} was never sent to this place"
        if found == before:
            return f"what was there before is back, but {last} is newer"
        # A sector torn by the end itself may also hold parts of zeros and of what was before.
        if self._in_flight(possible, at) and self._is_mixture(found, before, sector, possible):
            return None
        return f"unknown content {found[:16].hex()}…"

    @staticmethod
    def _in_flight(entries: list[Entry], at: int) -> bool:
        return any(not 0 < entry.answered <= at for entry in entries)

    @staticmethod
    def _is_mixture(found: bytes, before: bytes, sector: int, possible: list[Entry]) -> bool:
        size = PIECE.size
        allowed = {bytes(payload(e.serial, sector, sector + 1))[:size] for e in possible}
        allowed.add(bytes(size))
        return all(
            found[start : start + size] in (before[start : start + size], *allowed)
            for start in range(0, SECTOR, size)
        )

    def rebase(self, found: bytes) -> None:
        """Begin a new round: this is on the disk, and stable."""
        self.base = found
        self.entries = []
        self._touched = {}
        self._unstable = []


def _serials(content: bytes, sector: int) -> set[int | None]:
    """The serial numbers of the writes that a sector is made of; None for what is no write's."""
    serials: set[int | None] = set()
    for mark, serial, place, mixed in set(PIECE.iter_unpack(content)):
        genuine = mark == MARK and place == sector and mixed == (serial * MIX ^ sector) % 2**64
        serials.add(serial if genuine else None)
    return serials


def _shown(sectors: list[int]) -> str:
    return str(sectors[0]) if len(sectors) == 1 else f"{sectors[0]} … {sectors[-1]}"
