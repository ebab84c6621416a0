"""The fua filter: what each mode offers the client, and what the layer below is called with.

The expectations are written down from nbdkit-fua-filter(1) in `expected`; nbdkit itself, with the
same disk as a script, has to agree with them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import pynbdkit
import support
from pynbdkit import ConfigError, Device, Fua, Plugin, Session
from pynbdkit.filters.fua import MODES, FuaFilter

NONE, EMULATE, NATIVE = Fua.NONE, Fua.EMULATE, Fua.NATIVE
MAY_TRIM, FUA = 1, 2


class Disk(NamedTuple):
    """What is below the filter."""

    has_flush: bool
    can_fua: int | None

    def __str__(self) -> str:
        return f"{'flush' if self.has_flush else 'noflush'}.{self.can_fua}"


DISKS = [
    Disk(has_flush, can_fua)
    for has_flush, can_fua in product((False, True), (None, NONE, EMULATE, NATIVE))
    if has_flush or can_fua != EMULATE  # a promise without a flush: no server should take that
]


class Recorder(Device):
    """A disk that remembers what it was called with; its capabilities are the export's name."""

    def __init__(self, events: list[str], disk: str) -> None:
        self.events = events
        flush, _, can_fua = disk.partition(".")
        if flush == "flush":
            self.flush = self._flush  # type: ignore[method-assign]
        if can_fua != "None":
            self.can_fua = lambda: int(can_fua)  # type: ignore[method-assign]

    def get_size(self) -> int:
        return 1 << 20

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return bytes(count)

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self.events.append(f"pwrite {len(buf)} {offset} {flags}")

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.events.append(f"trim {count} {offset} {flags}")

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.events.append(f"zero {count} {offset} {flags}")

    def _flush(self, flags: int) -> None:
        self.events.append(f"flush {flags}")


class Recorders(Plugin):
    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def open(self, session: Session) -> Device:
        return Recorder(self.events, session.export_name)


SCRIPT = """
import builtins, nbdkit
API_VERSION = 2
disk = lambda: nbdkit.export_name().split(".")
def event(*words):
    with builtins.open(EVENTS, "a") as out:
        print(*words, file=out)
def open(readonly): return disk()
def get_size(h): return 1 << 20
def can_flush(h): return h[0] == "flush"
def can_trim(h): return True
def can_zero(h): return True
def can_fua(h):
    return (1 if h[0] == "flush" else 0) if h[1] == "None" else int(h[1])
def pread(h, buf, offset, flags): pass
def pwrite(h, buf, offset, flags): event("pwrite", len(buf), offset, flags)
def trim(h, count, offset, flags): event("trim", count, offset, flags)
def zero(h, count, offset, flags): event("zero", count, offset, flags)
def flush(h, flags): event("flush", flags)
"""
"""The same disk for nbdkit."""

Answer = tuple[Any, ...]


def expected(mode: str, disk: Disk) -> list[Answer] | None:
    """What a client sees and causes; None: its open is refused."""
    below = disk.can_fua
    if below is None:
        below = EMULATE if disk.has_flush else NONE
    if mode == "emulate" and not disk.has_flush:
        return None
    if mode in ("native", "force") and below == NONE:
        return None
    fua = mode in ("emulate", "native", "force", "discard") or (mode == "pass" and below != NONE)
    own_flush = mode in ("force", "discard")
    answers: list[Answer] = [("offers", fua, disk.has_flush or own_flush)]
    for command, asked in product(("pwrite", "trim", "zero"), (False, True)):
        if asked and not fua:
            answers.append((command, asked, errno.EINVAL, []))
            continue
        stable = mode == "force" or (asked and mode != "discard")
        told = stable and below == NATIVE and mode != "emulate"
        flags = (MAY_TRIM if command == "zero" else 0) | (FUA if told else 0)
        events = [f"{command} 512 1024 {flags}"]
        if stable and not told:
            events.append("flush 0")
        answers.append((command, asked, 0, events))
    if own_flush:
        answers.append(("flush", 0, []))
    elif disk.has_flush:
        answers.append(("flush", 0, ["flush 0"]))
    else:
        answers.append(("flush", errno.EINVAL, []))
    return answers


def ask(nbd: Any, uri: str, take: Callable[[], list[str]]) -> list[Answer] | None:
    """What a client sees and causes, in the words of `expected`."""
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    try:
        handle.connect_uri(uri)
    except nbd.Error:
        return None
    answers: list[Answer] = [("offers", handle.can_fua(), handle.can_flush())]

    def result(call: Callable[[], None]) -> tuple[int, list[str]]:
        take()
        try:
            call()
        except nbd.Error as error:
            return error.errnum, take()
        return 0, take()

    for command, asked in product(("pwrite", "trim", "zero"), (False, True)):
        method = getattr(handle, command)
        what = b"x" * 512 if command == "pwrite" else 512
        flags = nbd.CMD_FLAG_FUA if asked else 0
        answers.append((command, asked, *result(lambda m=method, w=what, f=flags: m(w, 1024, f))))  # type: ignore[misc]
    answers.append(("flush", *result(handle.flush)))
    handle.shutdown()
    return answers


@pytest.mark.parametrize("mode", MODES)
def test_mode(nbd: Any, mode: str) -> None:
    """Over every kind of disk: the offer, the errors, and the callbacks below, in order."""
    plugin = Recorders()

    def take() -> list[str]:
        events = plugin.events[:]
        plugin.events.clear()
        return events

    with pynbdkit.serve(plugin, filters=[FuaFilter(fuamode=mode)]) as server:
        for disk in DISKS:
            assert ask(nbd, server.export_uri(str(disk)), take) == expected(mode, disk), disk


@pytest.mark.parametrize("mode", MODES)
def test_nbdkit_agrees(nbd: Any, sockdir: Path, mode: str) -> None:
    """The expectations above are nbdkit's as well."""
    events = sockdir / "events"
    events.touch()
    script = sockdir / "disk.py"
    script.write_text(f"EVENTS = {str(events)!r}\n{SCRIPT}")

    def take() -> list[str]:
        lines = events.read_text().splitlines()
        events.write_text("")
        return lines

    # nbdkit 1.32 refuses its own default when it is given.
    arguments = [] if mode == "none" else [f"fuamode={mode}"]
    command = [support.program("nbdkit")]
    with support.ServerProcess(
        sockdir, ["--filter=fua", "python", script, *arguments], command
    ) as server:
        for disk in DISKS:
            assert ask(nbd, server.export_uri(str(disk)), take) == expected(mode, disk), disk


def test_default_is_none() -> None:
    assert FuaFilter().fuamode == "none"


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match=r"unknown fuamode 'often'.*none, emulate, native"):
        FuaFilter().config("fuamode", "often")


@pytest.mark.parametrize(
    ("mode", "disk", "message"),
    [
        ("emulate", "noflush.None", "fuamode=emulate: there is no flush"),
        ("native", "flush.0", "fuamode=native: the plugin does not support FUA"),
        ("force", "noflush.None", "fuamode=force: the plugin does not support FUA"),
    ],
)
def test_refusal_says_why(
    nbd: Any, capfd: pytest.CaptureFixture[str], mode: str, disk: str, message: str
) -> None:
    """The operator reads the reason; the next client, of a better disk, is served."""
    with pynbdkit.serve(Recorders(), filters=[FuaFilter(fuamode=mode)]) as server:
        client = nbd.NBD()
        with pytest.raises(nbd.Error):
            client.connect_uri(server.export_uri(disk))
        better = nbd.NBD()
        better.connect_uri(server.export_uri("flush.2"))
        better.shutdown()
    log = capfd.readouterr().err
    assert message in log
    assert "Traceback" not in log


@pytest.mark.parametrize("mode", MODES)
def test_read_only_is_never_refused(nbd: Any, connect: Callable[..., Any], mode: str) -> None:
    """To a client that cannot write, no mode promises anything."""
    with pynbdkit.serve(Recorders(), filters=[FuaFilter(fuamode=mode)], readonly=True) as server:
        client = connect(server.export_uri("noflush.None"))
        assert client.is_read_only()
        assert not client.can_fua()
        assert client.pread(512, 0) == bytes(512)


def test_emulated_failures_reach_the_client(nbd: Any, connect: Callable[..., Any]) -> None:
    """A flush that fails behind a write is the write's error; after a failed write, no flush."""

    class Failing(Recorder):
        def __init__(self) -> None:
            super().__init__(events, "flush.2")

        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            super().pwrite(buf, offset, flags)
            if offset:
                raise OSError(errno.ENOSPC, "full")

        def _flush(self, flags: int) -> None:
            super()._flush(flags)
            raise OSError(errno.EIO, "lost")

    events: list[str] = []
    with pynbdkit.serve(Failing, filters=[FuaFilter(fuamode="emulate")]) as server:
        client = connect(server)
        with pytest.raises(nbd.Error, match="Input/output error"):
            client.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_FUA)
        assert events == ["pwrite 512 0 0", "flush 0"]
        events.clear()
        with pytest.raises(nbd.Error, match="No space left"):
            client.pwrite(b"x" * 512, 512, nbd.CMD_FLAG_FUA)
        assert events == ["pwrite 512 512 0"]


def test_force_over_a_disk_without_zero(nbd: Any, connect: Callable[..., Any]) -> None:
    """Zeros that are written instead are as stable as any write: flushed once, at the end."""

    class NoZero(Device):
        def get_size(self) -> int:
            return 8 << 20

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            events.append(f"pwrite {flags}")

        def flush(self, flags: int) -> None:
            events.append("flush")

    events: list[str] = []
    with pynbdkit.serve(NoZero, filters=[FuaFilter(fuamode="force")]) as server:
        connect(server).zero(4 << 20, 0)
        assert events.pop() == "flush"
        assert set(events) == {"pwrite 0"}


@pytest.mark.parametrize("mode", MODES)
def test_a_promise_without_flush_is_refused(nbd: Any, mode: str) -> None:
    """A plugin that emulates FUA by a flush that it has not: no mode hides that."""
    with pynbdkit.serve(Recorders(), filters=[FuaFilter(fuamode=mode)]) as server:
        client = nbd.NBD()
        with pytest.raises(nbd.Error):
            client.connect_uri(server.export_uri("noflush.1"))
