"""What a server did between a request and its answer, as strace saw it: was it stable in time?

The trace holds all that is needed: requests as they were received, replies as they were sent, and
in between what was written and synced. Its order is the order in which things happened, wherever
one depends on the other: a call's result is printed before the thread goes on with it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "pwrite64,pwritev,pwritev2,write,writev,fdatasync,fsync,fallocate,"
    "sendto,sendmsg,recvfrom,recvmsg"
)
"""What to trace; also -f, -y, -xx, and -s with more than is ever received at once."""
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = b"\x25\x60\x95\x13"
SIMPLE_REPLY = re.compile(rb"\x67\x44\x66\x98(.{4})(.{8})", re.DOTALL)
WRITE, FLUSH, TRIM, ZERO = 1, 3, 4, 6
NAMES = {WRITE: "write", FLUSH: "flush", TRIM: "trim", ZERO: "zero"}
FUA = 1


@dataclass
class Call:
    """A system call; `start` and `end` count lines of the trace."""

    name: str
    file: str
    text: str
    start: int
    end: int

    @property
    def data(self) -> bytes:
        """All strings among its arguments, which are received or sent bytes."""
        return unescape("".join(re.findall(r'"((?:\\x..)*)"', self.text)))


@dataclass
class Request:
    """A request; `arrived`: the line after which the server has all of it."""

    command: int
    fua: bool
    offset: int
    count: int
    payload: bytes
    arrived: int

    def __str__(self) -> str:
        return f"{NAMES[self.command]}{', fua' * self.fua} at {self.offset}"


def unescape(text: str) -> bytes:
    """What strace's -xx has written as \\x2f\\x00 …"""
    return bytes.fromhex(text.replace("\\x", ""))


def calls(trace: Path) -> Iterator[Call]:
    """The calls of a trace that succeeded, with those put together that another one interrupted."""
    waiting: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(trace.read_text().splitlines()):
        thread, text = line.split(maxsplit=1)
        start = number
        if text.endswith("<unfinished ...>"):
            waiting[thread] = text.removesuffix("<unfinished ...>"), number
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            begin, start = waiting.pop(thread)
            text = begin + text[resumed.end() :]
        found = re.match(r"(\w+)\(\d+<((?:\\x..)+)>.*= \d+$", text)
        if found:
            yield Call(found[1], unescape(found[2]).decode(), text, start, number)


def requests_in(received: Iterable[Call]) -> Iterator[tuple[int, Request]]:
    """(cookie, request) of one connection."""
    stream = b""
    ends: list[tuple[int, int]] = []
    for call in received:
        stream += call.data
        ends.append((len(stream), call.end))
    place = stream.find(REQUEST_MAGIC)
    while 0 <= place <= len(stream) - REQUEST.size:
        magic, flags, command, cookie, offset, count = REQUEST.unpack_from(stream, place)
        assert magic == int.from_bytes(REQUEST_MAGIC), "the trace is not whole: a larger -s?"
        place += REQUEST.size
        payload = b""
        if command == WRITE:
            payload = stream[place : place + count]
            place += count
        arrived = next(line for length, line in ends if place <= length)
        if command in NAMES:
            yield cookie, Request(command, bool(flags & FUA), offset, count, payload, arrived)


class Trace:
    """`broken`: a line for each promise that was not kept when its reply was sent."""

    def __init__(self, trace: Path) -> None:
        self.checked: dict[str, int] = {}
        self.broken: list[str] = []
        self._writes: list[Call] = []
        self._zeros: list[Call] = []
        self._syncs: list[Call] = []
        received: dict[str, list[Call]] = {}
        replies: dict[tuple[str, int], Call] = {}
        for call in calls(trace):
            if call.file.startswith(("UNIX", "socket")):
                if call.name.startswith(("send", "write")):
                    for reply in SIMPLE_REPLY.finditer(call.data):
                        assert reply[1] == bytes(4), "a request failed"
                        replies[call.file, int.from_bytes(reply[2])] = call
                else:
                    received.setdefault(call.file, []).append(call)
            elif call.name.startswith("pwrite"):
                self._writes.append(call)
            elif call.name == "fallocate":
                self._zeros.append(call)
            elif call.name in ("fdatasync", "fsync"):
                self._syncs.append(call)
        self._contents = [call.data for call in self._writes]
        for connection, some in received.items():
            for cookie, request in requests_in(some):
                if (connection, cookie) in replies:
                    self._check(request, replies[connection, cookie].start)

    def _check(self, request: Request, replied: int) -> None:
        what = f"{NAMES[request.command]}{', fua' * request.fua}"
        self.checked[what] = self.checked.get(what, 0) + 1
        if request.command == WRITE:
            done = any(
                request.arrived < write.start
                and write.end < replied
                and request.payload in content
                and (not request.fua or self._is_stable(write, replied))
                for write, content in zip(self._writes, self._contents, strict=True)
            )
        elif request.command == FLUSH or request.fua:
            changes = [
                call.end
                for call in self._zeros
                if request.arrived < call.start
                and call.end < replied
                and call.text.rpartition(")")[0].endswith(f" {request.offset}, {request.count}")
            ]
            done = self._is_synced(max(changes, default=request.arrived), replied)
            if request.command == ZERO and not changes:  # then zeros may have been written
                done = done or any(
                    request.arrived < write.start
                    and write.end < replied
                    and content == bytes(request.count)
                    and self._is_stable(write, replied)
                    for write, content in zip(self._writes, self._contents, strict=True)
                )
        else:
            return
        if not done:
            self.broken.append(f"{request} was answered in line {replied}")

    def _is_stable(self, write: Call, replied: int) -> bool:
        return "RWF_DSYNC" in write.text or self._is_synced(write.end, replied, write.file)

    def _is_synced(self, after: int, before: int, file: str = "") -> bool:
        return any(
            after < sync.start and sync.end < before and file in ("", sync.file)
            for sync in self._syncs
        )
