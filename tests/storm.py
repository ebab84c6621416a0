"""Many requests of every kind at once, on several connections, and a model of what must come of it.

The model is a plain array of bytes. Requests that touch the same bytes, of which one changes them,
are never in flight together (what would come of that is nobody's promise); all else is. What one
connection was answered, each other one has to see at once, so reads are checked as they come.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

Bytes = bytes | bytearray

DEPTH = 24
"""Requests in flight on each connection, at most."""
LARGEST = 300_000
COUNTS = (1, 511, 512, 4096, 4097, 65536, 65537, 131072)
STEPS = (1, 512, 4096, 65536)
HOLE_OR_ZERO = 3
KINDS = {
    "read": 30,
    "write": 30,
    "write, fua": 12,
    "zero": 8,
    "zero, fua": 4,
    "trim": 8,
    "trim, fua": 4,
    "flush": 3,
    "block status": 6,
    "cache": 2,
}
CHANGES = frozenset({"write", "zero", "trim"})


@dataclass
class Call:
    """One request: what it asked for, and while it is in flight, what has to come of it."""

    number: int
    client: int
    kind: str
    first: int
    end: int
    flags: int = 0
    cookie: int = 0
    data: bytes = b""
    buffer: Any = None
    extents: list[int] = field(default_factory=list)
    refused: bool = False

    @property
    def command(self) -> str:
        return self.kind.split(",")[0]

    def conflicts(self, other: Call) -> bool:
        return (
            self.first < other.end
            and other.first < self.end
            and (self.command in CHANGES or other.command in CHANGES)
        )

    def __str__(self) -> str:
        refused = " refused" if self.refused else ""
        return (
            f"#{self.number} connection {self.client}: {self.kind} [{self.first}, {self.end})"
            f" flags {self.flags}{refused}"
        )


class Storm:
    """`content`: what is on the disk now; afterwards, what has to be there."""

    def __init__(
        self, nbd: ModuleType, clients: Sequence[Any], content: bytes, seed: int = 1
    ) -> None:
        self.nbd: Any = nbd
        self.clients = clients
        self.content = bytearray(content)
        self.rng = random.Random(seed)
        self.flying: list[Call] = []
        self.history: list[Call] = []

    def run(self, requests: int) -> None:
        """Send so many requests. Raises AssertionError where an answer is wrong."""
        kinds = self.rng.choices(list(KINDS), list(KINDS.values()), k=requests)
        for number, kind in enumerate(kinds):
            call = self._choose(number, kind)
            for other in list(self.flying):
                if call.conflicts(other):
                    self._finish(other)
            mine = [other for other in self.flying if other.client == call.client]
            if len(mine) >= DEPTH:
                self._finish(self.rng.choice(mine))
            self._send(call)
        for call in list(self.flying):
            self._finish(call)

    def _choose(self, number: int, kind: str) -> Call:
        rng, size = self.rng, len(self.content)
        if self.flying and rng.random() < 0.5:  # a neighbour of one that is not answered yet
            first = rng.choice(self.flying).end % size
            end = min(first + rng.randrange(1, 5000), size)
        else:
            first = rng.randrange(size)
            first -= first % rng.choice(STEPS)
            count = rng.choice(COUNTS) if rng.random() < 0.7 else rng.randrange(1, LARGEST)
            end = size if rng.random() < 0.03 else min(first + count, size)
        if kind == "flush":
            first = end = 0
        elif kind in ("block status", "cache"):
            end = min(first + 1_000_000, size)
        call = Call(number, rng.randrange(len(self.clients)), kind, first, end)
        if "fua" in kind:
            call.flags |= self.nbd.CMD_FLAG_FUA
        if call.command == "zero":
            call.flags |= rng.choice((0, self.nbd.CMD_FLAG_NO_HOLE))
            call.flags |= rng.choice((0, self.nbd.CMD_FLAG_FAST_ZERO))
        return call

    def _send(self, call: Call) -> None:
        client, nbd = self.clients[call.client], self.nbd
        count, first, flags = call.end - call.first, call.first, call.flags
        match call.command:
            case "read":
                call.data = bytes(self.content[first : call.end])
                call.buffer = nbd.Buffer(count)
                call.cookie = client.aio_pread(call.buffer, first)
            case "write":
                call.data = self.rng.choice((bytes, self.rng.randbytes, self.rng.randbytes))(count)
                call.buffer = nbd.Buffer.from_bytearray(bytearray(call.data))
                call.cookie = client.aio_pwrite(call.buffer, first, flags=flags)
            case "zero":
                call.data = bytes(count)
                call.cookie = client.aio_zero(count, first, flags=flags)
            case "trim":
                call.data = bytes(count)
                call.cookie = client.aio_trim(count, first, flags=flags)
            case "flush":
                call.cookie = client.aio_flush()
            case "cache":
                call.cookie = client.aio_cache(count, first)
            case "block status":

                def note(context: str, offset: int, entries: list[int], error: Any) -> int:
                    call.extents.extend(entries)
                    return 0

                call.cookie = client.aio_block_status(count, first, note)
        self.flying.append(call)
        self.history.append(call)

    def _finish(self, call: Call) -> None:
        """Wait for the answer, check it, and let the model follow."""
        client = self.clients[call.client]
        try:
            while not client.aio_command_completed(call.cookie):
                client.poll(-1)
        except self.nbd.Error as error:
            fast = call.flags & self.nbd.CMD_FLAG_FAST_ZERO
            if not (fast and error.errno in ("ENOTSUP", "EOPNOTSUPP")):
                raise AssertionError(f"{call}: {error.string}") from None
            call.refused = True
        self.flying.remove(call)
        if call.command == "read":
            self.compare(call.buffer.to_bytearray(), call.data, call.first, str(call))
        elif call.command == "block status":
            self._check_extents(call)
        elif call.command in CHANGES and not call.refused:
            self.content[call.first : call.end] = call.data
        call.data, call.buffer = b"", None

    def _check_extents(self, call: Call) -> None:
        place = call.first
        for length, kind in zip(call.extents[::2], call.extents[1::2], strict=True):
            end = min(place + length, len(self.content))
            if kind & HOLE_OR_ZERO and any(memoryview(self.content)[place : min(end, call.end)]):
                raise AssertionError(f"{call}: [{place}, {end}) is said to be zero, and is not")
            place = end
        assert place > call.first, f"{call}: no extents"

    def compare(self, found: Bytes, expected: Bytes, first: int, what: str) -> None:
        """Raise AssertionError with what has happened to the first byte that differs."""
        assert len(found) == len(expected)
        if found == expected:
            return
        place = first + next(at for at, byte in enumerate(found) if byte != expected[at])
        wrong = sum(one != other for one, other in zip(found, expected, strict=True))
        story = [str(call) for call in self.history if call.first <= place < call.end]
        raise AssertionError(
            f"{what}: {wrong} bytes are wrong, the first at {place}. Before:\n"
            + "\n".join(story[-8:])
        )
