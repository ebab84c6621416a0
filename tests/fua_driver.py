"""The client of the FUA matrix: libnbd, told to check nothing, so that the server must.

A `Driver` opens one subject on one connection, compares what is offered with the model, sends
requests one by one, and compares the callbacks and the error of each. It returns what differs, a
line for each difference, so that a test may look at many subjects before it fails.
"""

from __future__ import annotations

import ast
import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fua_subjects
from fua_model import FILL, NATIVE, Event, Refused, Request, Subject, Terms, outcome, terms


class Unopened(Exception):
    """The server let no client open this export. `client`: the connection, still there."""

    def __init__(self, message: str, client: Any) -> None:
        super().__init__(message)
        self.client = client


class Log:
    """What the plugin in this process was called with."""

    def take(self) -> list[Event]:
        taken = list(fua_subjects.events)
        fua_subjects.events.clear()
        return taken


class FileLog(Log):
    """What a plugin in another process was called with; see FUA_EVENTS."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open()

    def take(self) -> list[Event]:
        return [ast.literal_eval(line) for line in self._file]


class Driver:
    """`nbd` is libnbd's module, `socket` the server's, `read_only`: the server only reads.

    A client that was refused stays while the next one is served, unless it shall `hang_up`.
    """

    def __init__(
        self,
        nbd: ModuleType,
        socket: str,
        log: Log,
        *,
        read_only: bool = False,
        hang_up: bool = False,
    ) -> None:
        self.nbd: Any = nbd
        self.socket = socket
        self.log = log
        self.read_only = read_only
        self.hang_up = hang_up

    def handle(self, export: str = "") -> Any:
        """A libnbd handle that will send whatever it is asked to."""
        client = self.nbd.NBD()
        client.set_strict_mode(0)
        client.set_opt_mode(True)
        client.set_export_name(export)
        return client

    def connect(self, subject: Subject) -> Any:
        """A connection with the export opened. Raises Unopened when the server refuses it."""
        client = self.handle(str(subject))
        client.add_meta_context(self.nbd.CONTEXT_BASE_ALLOCATION)
        client.connect_unix(self.socket)
        try:
            client.opt_go()
        except self.nbd.Error as refused:
            raise Unopened(str(refused), client) from None
        return client

    def is_alive(self) -> bool:
        """The server answers the next client."""
        client = self.handle()
        try:
            client.connect_unix(self.socket)
            client.opt_list(lambda name, description: 0)
            client.opt_abort()
        except self.nbd.Error:
            return False
        return True

    def start(self, client: Any, request: Request) -> int:
        """Send the request. Returns its cookie."""
        flags = self.nbd.CMD_FLAG_FUA * request.fua
        flags |= self.nbd.CMD_FLAG_NO_HOLE * request.no_hole
        flags |= self.nbd.CMD_FLAG_FAST_ZERO * request.fast
        count, offset = request.count, request.offset
        buf = self.nbd.Buffer.from_bytearray(bytearray([FILL]) * count)
        calls: dict[str, Callable[[], Any]] = {
            "write": lambda: client.aio_pwrite(buf, offset, flags=flags),
            "trim": lambda: client.aio_trim(count, offset, flags=flags),
            "zero": lambda: client.aio_zero(count, offset, flags=flags),
            "read": lambda: client.aio_pread(buf, offset, flags=flags),
            "flush": lambda: client.aio_flush(flags=flags),
            "cache": lambda: client.aio_cache(count, offset, flags=flags),
            "block status": lambda: client.aio_block_status(
                count, offset, lambda *_: 0, flags=flags
            ),
        }
        return int(calls[request.command]())

    def finish(self, client: Any, cookie: int) -> int:
        """Wait for the reply. Returns 0 or the error's errno."""
        try:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
        except self.nbd.Error as failed:
            return int(failed.errnum) or errno.EPROTO
        return 0

    def send(self, client: Any, *requests: Request) -> list[int]:
        """Send the requests at once, then wait for all replies."""
        cookies = [self.start(client, request) for request in requests]
        return [self.finish(client, cookie) for cookie in cookies]

    def check(self, subject: Subject, requests: Sequence[Request]) -> list[str]:
        """Open the subject and send it the requests. Returns a text for each difference."""
        expected = terms(subject, read_only=self.read_only)
        self.log.take()
        fua_subjects.asked.clear()
        try:
            client = self.connect(subject)
        except Unopened as refused:
            if self.hang_up:
                refused.client.opt_abort()
            if not self.is_alive():
                return [f"{subject}: refused ({refused}), and the server is gone with it"]
            if isinstance(expected, Refused):
                return []
            return [f"{subject}: refused ({refused}), expected {expected}"]
        if isinstance(expected, Refused):
            client.shutdown()
            return [f"{subject}: opened, expected a refusal: {expected.why}"]
        wrong = []
        if fua_subjects.asked["can_fua"] > 1:
            wrong.append(f"{subject}: can_fua was asked {fua_subjects.asked['can_fua']} times")
        for name, offered in {
            "is_read_only": expected.read_only,
            "can_fua": expected.fua,
            "can_flush": expected.flush,
            "can_trim": expected.trim,
            "can_zero": expected.zero,
            "can_fast_zero": expected.fast_zero,
        }.items():
            if getattr(client, name)() != offered:
                wrong.append(f"{subject}: the client is told {name} = {not offered}")
        if stray := self.log.take():
            wrong.append(f"{subject}: the open itself called {stray}")
        for request in requests:
            if request.command == "flush":
                # A flush has no offset: a read tells the plugin which region it comes from.
                self.send(client, Request("read", mood=request.mood))
                self.log.take()
            wanted = outcome(subject, expected, request)
            [number] = self.send(client, request)
            events = self.log.take()
            if join_pieces(events) != list(wanted.events) or number not in wanted.errnos:
                wrong.append(
                    f"{subject}: {request}\n"
                    f"    expected {list(wanted.events)} and {names(wanted.errnos)}\n"
                    f"    but got  {events} and {names([number])}"
                )
        client.shutdown()
        return wrong

    def check_pipelined(self, subject: Subject, requests: Sequence[Request]) -> list[str]:
        """Send the subject all requests at once: it is called as if they came one by one."""
        offer = terms(subject)
        assert isinstance(offer, Terms)
        client = self.connect(subject)
        self.log.take()
        numbers = self.send(client, *requests)
        client.shutdown()
        wanted = [outcome(subject, offer, request) for request in requests]
        events = [event for one in wanted for event in one.events]
        wrong = [
            f"{subject}: {request}, among others: got {names([number])}"
            for number, one, request in zip(numbers, wanted, requests, strict=True)
            if number not in one.errnos
        ]
        if (called := self.log.take()) != events:
            wrong.append(f"{subject}: pipelined:\n    expected {events}\n    but got  {called}")
        return wrong


def join_pieces(events: Iterable[Event]) -> list[Event]:
    """Zeros that were written in pieces, each from where the last one ended, as one event."""
    joined: list[Event] = []
    for event in events:
        match (*joined[-1:], event):
            case (
                (("pwrite" | "pwrite_fua") as name, int(start), int(length), 0, *flags),
                (piece_name, int(offset), int(count), 0, *piece_flags),
            ) if name == piece_name and flags == piece_flags and start + length == offset:
                joined[-1] = (name, start, length + count, 0, *flags)
            case _:
                joined.append(event)
    return joined


def names(numbers: Iterable[int]) -> str:
    """Error numbers for humans."""
    return " or ".join(errno.errorcode.get(n, str(n)) if n else "success" for n in sorted(numbers))


Serve = Callable[..., AbstractContextManager[Driver]]
"""Serves a subject to a driver."""


def check_all(serve: Serve, subjects: Iterable[Subject], requests: Sequence[Request]) -> list[str]:
    """What differs, of all subjects; those with the same script share a server."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        script = NATIVE if subject.form == NATIVE else fua_subjects.script(subject)
        groups.setdefault(script, []).append(subject)
    wrong = []
    for group in groups.values():
        with serve(group[0]) as driver:
            for subject in group:
                wrong += driver.check(subject, requests)
    return wrong


def report(wrong: Sequence[str]) -> None:
    if wrong:
        shown = "\n".join(wrong[:20])
        pytest.fail(f"{len(wrong)} differences; the first of them:\n{shown}", pytrace=False)
