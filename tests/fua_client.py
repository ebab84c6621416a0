"""The client of the FUA matrix: libnbd, told to check nothing, so that the server must.

`check` opens one subject on one connection, compares what is offered with the model, sends
requests one by one, and compares the callbacks and the error of each. It returns what differs, a
line for each difference, so that a test may look at many subjects before it fails.
"""

from __future__ import annotations

import ast
import errno
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import fua_subjects
from fua_model import FILL, Event, Refused, Request, Subject, outcome, terms

CONTEXT = "base:allocation"

DEBIAN = Path("/usr/lib/python3/dist-packages")


def load_nbd() -> Any:
    """libnbd's Python module; in a virtual environment, the distribution's. Raises ImportError."""
    try:
        import nbd
    except ImportError:
        import importlib.util
        import sys

        for name, pattern in ("libnbdmod", "libnbdmod*.so"), ("nbd", "nbd.py"):
            for path in DEBIAN.glob(pattern):
                spec = importlib.util.spec_from_file_location(name, path)
                assert spec is not None
                assert spec.loader is not None
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
        import nbd
    return nbd


try:
    nbd = load_nbd()
except ImportError:
    nbd = None


class Unopened(Exception):
    """The server let no client open this export."""


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


def handle(export: str = "") -> Any:
    """A libnbd handle that will send whatever it is asked to."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.set_opt_mode(True)
    client.set_export_name(export)
    return client


def connect(socket: str, export: str) -> Any:
    """A connection with the export opened. Raises Unopened when the server refuses it."""
    client = handle(export)
    client.add_meta_context(CONTEXT)
    client.connect_unix(socket)
    try:
        client.opt_go()
    except nbd.Error as refused:
        raise Unopened(str(refused)) from None
    return client


def is_alive(socket: str) -> bool:
    """The server answers the next client."""
    client = handle()
    try:
        client.connect_unix(socket)
        client.opt_list(lambda name, description: 0)
        client.opt_abort()
    except nbd.Error:
        return False
    return True


def send(client: Any, request: Request) -> int:
    """Send the request, wait for its reply. Returns 0 or the error's errno."""
    flags = nbd.CMD_FLAG_FUA * request.fua
    flags |= nbd.CMD_FLAG_NO_HOLE * request.no_hole
    flags |= nbd.CMD_FLAG_FAST_ZERO * request.fast
    count, offset = request.count, request.offset
    calls: dict[str, Callable[[], Any]] = {
        "write": lambda: client.pwrite(bytearray([FILL]) * count, offset, flags),
        "trim": lambda: client.trim(count, offset, flags),
        "zero": lambda: client.zero(count, offset, flags),
        "read": lambda: client.pread(count, offset, flags),
        "flush": lambda: client.flush(flags),
        "cache": lambda: client.cache(count, offset, flags),
        "block status": lambda: client.block_status(count, offset, lambda *_: 0, flags),
    }
    try:
        calls[request.command]()
    except nbd.Error as failed:
        return int(failed.errnum) or errno.EPROTO
    return 0


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


def check(
    socket: str,
    subject: Subject,
    requests: Sequence[Request],
    log: Log,
    *,
    send: Callable[[Any, Request], int] = send,
) -> list[str]:
    """Open the subject and send it the requests. Returns one line for each difference."""
    expected = terms(subject)
    log.take()
    fua_subjects.asked.clear()
    try:
        client = connect(socket, str(subject))
    except Unopened as refused:
        if not is_alive(socket):
            return [f"{subject}: the server has gone with the open that it refused: {refused}"]
        if isinstance(expected, Refused):
            return []
        return [f"{subject}: refused ({refused}), expected {expected}"]
    wrong = []
    if fua_subjects.asked["can_fua"] > 1:
        wrong.append(f"{subject}: can_fua was asked {fua_subjects.asked['can_fua']} times")
    if isinstance(expected, Refused):
        client.shutdown()
        return [f"{subject}: opened, expected a refusal: {expected.why}"]
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
    if stray := log.take():
        wrong.append(f"{subject}: the open itself called {stray}")
    for request in requests:
        if request.command == "flush":
            # A flush has no offset: a read tells the plugin which region it comes from.
            send(client, Request("read", mood=request.mood))
            log.take()
        wanted = outcome(subject, expected, request)
        number = send(client, request)
        events = log.take()
        if join_pieces(events) != list(wanted.events) or number not in wanted.errnos:
            wrong.append(
                f"{subject}: {request}\n"
                f"    expected {list(wanted.events)} and {names(wanted.errnos)}\n"
                f"    but got  {events} and {names([number])}"
            )
    client.shutdown()
    return wrong


def names(numbers: Iterable[int]) -> str:
    return " or ".join(errno.errorcode.get(n, str(n)) if n else "success" for n in sorted(numbers))
