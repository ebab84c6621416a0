"""What a request gets for an answer, whatever the plugin returns or raises.

Each test runs twice: where calls run as they are read, and where they are dispatched to threads.
"""

from __future__ import annotations

import array
import asyncio
import errno
import mmap
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
from bare import bare_transmission
from pynbdkit import CacheMode, Device, Fua, Plugin, RunningServer, Session, ThreadModel, log
from pynbdkit.protocol.requests import RequestParser
from pynbdkit.server import receiver
from pynbdkit.server.runner import HOLE_PAYS
from raw import CACHE, FLUSH, READ, STATUS, TRIM, WRITE, ZEROES, Raw

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
DATA, HOLE, BLOCK_STATUS, ERROR, ERROR_OFFSET = 1, 2, 5, 0x8001, 0x8002
SIZE = 1 << 20
_CONTENT = (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]


class Disk(Device):
    """Every operation; `calls` has what was called, `result` and `failure` replace what it does."""

    def __init__(self) -> None:
        self.data = bytearray(_CONTENT)
        self.calls: list[tuple[Any, ...]] = []
        self.result: Callable[[bytes], Any] = lambda data: data
        self.failure: Callable[[], BaseException] | None = None
        self.answer: Any = None
        self.fua = Fua.NATIVE

    def get_size(self) -> int:
        return SIZE

    def can_fua(self) -> int:
        return self.fua

    def can_fast_zero(self) -> bool:
        return True

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure()

    def pread(self, count: int, offset: int, flags: int) -> Any:
        self._called("pread", count, offset, flags)
        return self.result(bytes(self.data[offset : offset + count]))

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self._called("pwrite", bytes(buf), offset, flags)

    def flush(self, flags: int) -> None:
        self._called("flush", flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._called("trim", count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._called("zero", count, offset, flags)

    def cache(self, count: int, offset: int, flags: int) -> None:
        self._called("cache", count, offset, flags)

    def extents(self, count: int, offset: int, flags: int) -> Any:
        self._called("extents", count, offset, flags)
        return self.answer or [(0, SIZE // 2, 0), (SIZE // 2, SIZE // 2, 3)]


class Disks(Plugin):
    """One disk for all connections."""

    name = "disks"

    def __init__(self, disk: Device) -> None:
        super().__init__()
        self.disk = disk

    def open(self, session: Session) -> Device:
        return self.disk


@pytest.fixture(autouse=True)
def _every_traceback_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_seen", set())


@pytest.fixture(params=[False, True], ids=["inline", "dispatched"])
def disk(request: pytest.FixtureRequest) -> Disk:
    disk = Disk()
    disk.blocking = request.param
    return disk


@pytest.fixture
def server(disk: Disk) -> Iterator[RunningServer]:
    with pynbdkit.serve(Disks(disk)) as server:
        yield server


def connection(server: RunningServer, *, structured: bool = True, context: bool = False) -> Raw:
    assert server.socket is not None
    if not context:
        return Raw(server.socket, structured=structured)
    client = Raw(server.socket, go=False)
    client.receive(18)
    client.send(struct.pack(">I", 3))
    client.option(8)
    assert client.reply()[1] == 1
    query = b"base:allocation"
    client.option(10, struct.pack(">III", 0, 1, len(query)) + query)
    assert client.reply()[1] == 4
    assert client.reply()[1] == 1
    client.option(7, bytes(6))
    while client.reply()[1] != 1:
        pass
    return client


def still_serves(client: Raw, disk: Disk, structured: bool = True) -> None:
    """The connection goes on: a read of another range gives what is there."""
    disk.failure, disk.result = None, lambda data: data
    client.ask(READ, 99, 7, 13)
    if structured:
        assert client.chunk() == (99, 1, DATA, struct.pack(">Q", 7) + disk.data[7:20])
    else:
        assert client.simple(13) == (99, 0, bytes(disk.data[7:20]))


# -- what pread returns ----------------------------------------------------------------------------


def _mapped(data: bytes) -> mmap.mmap:
    mapping = mmap.mmap(-1, len(data))
    mapping[:] = data
    return mapping


class _Bytes(bytes):
    pass


BUFFERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda data: data,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "slice": lambda data: memoryview(b"xx" + data + b"yy")[2:-2],
    "writable slice": lambda data: memoryview(bytearray(b"x" + data))[1:],
    "more than was asked for": lambda data: data + b"more",
    "longer bytearray": lambda data: bytearray(data + b"more"),
    "longer memoryview": lambda data: memoryview(data + b"more"),
    "numbers of 8 bytes": lambda data: memoryview(data).cast("Q"),
    "as many numbers as bytes were asked for": lambda data: memoryview(data + 7 * data).cast("Q"),
    "signed bytes": lambda data: memoryview(data).cast("b"),
    "characters": lambda data: memoryview(data).cast("c"),
    "array": lambda data: array.array("I", data),
    "every other byte": lambda data: memoryview(bytes(b for b in data for _ in "ab"))[::2],
    "backwards": lambda data: memoryview(data[::-1])[::-1],
    "rows": lambda data: memoryview(data).cast("B", (len(data) // 8, 8)),
    "columns": lambda data: memoryview(data).cast("B", (8, len(data) // 8)),
    "rows of one": lambda data: memoryview(data).cast("B", (len(data), 1)),
    "mapping": _mapped,
    "slice of a mapping": lambda data: _mapped(data)[:],
    "view of a mapping": lambda data: memoryview(_mapped(data)),
    "subclass": _Bytes,
}


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("name", list(BUFFERS))
def test_any_buffer_is_sent(server: RunningServer, disk: Disk, name: str, structured: bool) -> None:
    disk.result = BUFFERS[name]
    with connection(server, structured=structured) as client:
        for count, offset in ((4096, 512), (HOLE_PAYS * 2, 8)):
            client.ask(READ, 3, offset, count)
            expected = bytes(disk.data[offset : offset + count])
            if structured:
                assert client.chunk() == (3, 1, DATA, struct.pack(">Q", offset) + expected)
            else:
                assert client.simple(count) == (3, 0, expected)
        still_serves(client, disk, structured)


def _released(data: bytes) -> memoryview:
    view = memoryview(data)
    view.release()
    return view


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda data: data[:-1], "4095 bytes instead of 4096"),
        (lambda data: b"", "0 bytes instead of 4096"),
        (lambda data: bytearray(data[1:]), "4095 bytes instead of 4096"),
        (lambda data: memoryview(data)[1:], "4095 bytes instead of 4096"),
        (lambda data: memoryview(data)[8:].cast("Q"), "4088 bytes instead of 4096"),
        (lambda data: array.array("I", data[4:]), "4092 bytes instead of 4096"),
        (lambda data: None, "NoneType instead of 4096 bytes"),
        (lambda data: data.decode("latin-1"), "str instead of 4096 bytes"),
        (lambda data: 4096, "int instead of 4096 bytes"),
        (lambda data: list(data), "list instead of 4096 bytes"),
        (lambda data: (byte for byte in data), "generator instead of 4096 bytes"),
        (_released, "released"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_the_plugins_mistake(
    server: RunningServer,
    disk: Disk,
    capsys: pytest.CaptureFixture[str],
    result: Callable[[bytes], Any],
    words: str,
) -> None:
    for structured in (False, True):
        with connection(server, structured=structured) as client:
            disk.result = result
            client.ask(READ, 3, 512, 4096)
            if structured:
                cookie, flags, kind, body = client.chunk()
                assert (cookie, flags, kind) == (3, 1, ERROR_OFFSET)
                assert struct.unpack(">I", body[:4]) == (EIO,)
            else:
                assert client.simple() == (3, EIO, b"")
            still_serves(client, disk, structured)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 2
    for line in lines:
        assert re.search(r"disks: pread: offset 512, count 4096: .*" + words, line)


# -- what is raised --------------------------------------------------------------------------------

ERRNOS = [
    (errno.EPERM, EPERM), (errno.EROFS, EPERM), (errno.EIO, EIO), (errno.ENOMEM, ENOMEM),
    (errno.EINVAL, EINVAL), (errno.ENOSPC, ENOSPC), (errno.EFBIG, ENOSPC), (errno.EDQUOT, ENOSPC),
    (errno.EOVERFLOW, EOVERFLOW), (errno.EOPNOTSUPP, ENOTSUP), (errno.ESHUTDOWN, ESHUTDOWN),
    (errno.ENOENT, EIO), (errno.EACCES, EIO), (errno.ETIMEDOUT, EIO), (0, EIO), (99999, EIO),
]  # fmt: skip

OTHERS: list[tuple[Callable[[], BaseException], int]] = [
    (lambda: OSError("no number"), EIO),
    (lambda: OSError(), EIO),
    (lambda: ValueError("wrong"), EIO),
    (lambda: KeyError("missing"), EIO),
    (lambda: IndexError("list index out of range"), EIO),
    (lambda: StopIteration(), EIO),
    (lambda: MemoryError(), ENOMEM),
    (lambda: TimeoutError(), EIO),
    (lambda: ConnectionResetError(errno.ECONNRESET, "gone"), EIO),
    (lambda: SystemExit(1), EIO),
    (lambda: asyncio.CancelledError(), EIO),
    (lambda: GeneratorExit(), EIO),
]

COMMANDS = {
    READ: ("pread", 512, 4096),
    WRITE: ("pwrite", 512, 4096),
    FLUSH: ("flush", 0, 0),
    TRIM: ("trim", 512, 4096),
    CACHE: ("cache", 512, 4096),
    ZEROES: ("zero", 512, 4096),
    STATUS: ("extents", 512, 4096),
}


def ask(client: Raw, kind: int, cookie: int = 5, flags: int = 0) -> None:
    """A request of this kind, good in every way."""
    _, offset, count = COMMANDS[kind]
    client.ask(kind, cookie, offset, count, flags, b"w" * count if kind == WRITE else b"")


def fails_with(
    client: Raw, kind: int, structured: bool, cookie: int = 5, flags: int = 0
) -> tuple[int, str]:
    """(error, message) that a request gets."""
    ask(client, kind, cookie, flags)
    if not structured:
        got, error, _ = client.simple()
        assert got == cookie
        return error, ""
    got, done, chunk, body = client.chunk()
    assert (got, done) == (cookie, 1)
    error, length = struct.unpack(">IH", body[:6])
    rest = body[6 + length :]
    if kind == READ:
        assert chunk == ERROR_OFFSET
        assert rest == struct.pack(">Q", COMMANDS[kind][1])
    else:
        assert (chunk, rest) == (ERROR, b"")
    return error, body[6 : 6 + length].decode()


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_every_errno_becomes_one_of_the_protocols(
    server: RunningServer, disk: Disk, kind: int
) -> None:
    for structured in (False, True):
        with connection(server, structured=structured) as client:
            for number, expected in ERRNOS:
                disk.failure = lambda number=number: OSError(number, "because")
                error, message = fails_with(client, kind, structured)
                assert error == expected, number
                if structured:
                    assert COMMANDS[kind][0] in message
            still_serves(client, disk, structured)


@pytest.mark.parametrize("kind", list(COMMANDS))
def test_whatever_a_callback_raises_is_an_error_and_the_connection_goes_on(
    server: RunningServer, disk: Disk, kind: int
) -> None:
    with connection(server, context=True) as client:
        for failure, expected in [*OTHERS, (lambda: OSError(errno.ENOSPC, "full"), ENOSPC)]:
            disk.failure = failure
            assert fails_with(client, kind, True)[0] == expected, failure()
        still_serves(client, disk)


@pytest.mark.parametrize("kind", list(COMMANDS))
def test_the_log_says_what_failed_and_where_with_one_traceback(
    server: RunningServer, disk: Disk, kind: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name, offset, count = COMMANDS[kind]
    disk.failure = lambda: ValueError("something is wrong")
    with connection(server, context=True) as client:
        for _ in range(3):
            fails_with(client, kind, True)
    text = capsys.readouterr().err
    line = rf"error: disks: {name}: offset {offset}, count {count}: .*something is wrong"
    assert len(re.findall(line, text)) == 3
    assert text.count("Traceback") == 1
    assert text.count(f'"{__file__}"') == text.count(
        "test_transmission.py"
    )  # the plugin's own lines
    assert "in _called" in text


def test_the_traceback_of_an_oserror_is_shown_as_well(
    server: RunningServer, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.failure = lambda: OSError(errno.ENOSPC, "the disk is full")
    with connection(server) as client:
        for _ in range(2):
            assert fails_with(client, WRITE, True) == (ENOSPC, "pwrite: the disk is full")
    text = capsys.readouterr().err
    assert text.count("Traceback") == 1
    assert len(re.findall(r"disks: pwrite: offset 512, count 4096: the disk is full", text)) == 2


def test_what_another_exception_says_is_for_the_log_alone(
    server: RunningServer, disk: Disk
) -> None:
    disk.failure = lambda: ValueError("the password is secret")
    with connection(server) as client:
        error, message = fails_with(client, READ, True)
    assert error == EIO
    assert "secret" not in message
    assert message


def test_a_fast_zero_that_is_not_fast_is_no_news(
    server: RunningServer, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.failure = lambda: OSError(errno.EOPNOTSUPP, "not fast")
    with connection(server) as client:
        assert fails_with(client, ZEROES, True, flags=FAST_ZERO)[0] == ENOTSUP
    assert "error" not in capsys.readouterr().err


# -- structured replies ----------------------------------------------------------------------------


def _read(client: Any, nbd: ModuleType, count: int, offset: int, flags: int = 0) -> list[Any]:
    """Read with libnbd, and tell the chunks: (data or None for a hole, offset, length)."""
    chunks: list[Any] = []

    def on_chunk(data: Any, at: int, status: int, error: Any) -> int:
        chunks.append((None if status == nbd.READ_HOLE else bytes(data), at, len(data)))
        return 0

    client.pread_structured(count, offset, on_chunk, flags)
    return chunks


def test_zeros_are_sent_as_a_hole_where_that_pays(
    server: RunningServer, disk: Disk, nbd: ModuleType, connect: Callable[..., Any]
) -> None:
    client = connect(server)
    disk.data[:] = bytes(SIZE)
    assert _read(client, nbd, 4 * HOLE_PAYS, 4096) == [(None, 4096, 4 * HOLE_PAYS)]
    assert _read(client, nbd, HOLE_PAYS, 0) == [(None, 0, HOLE_PAYS)]
    assert _read(client, nbd, 512, 0) == [(bytes(512), 0, 512)]
    for place in (0, 1, HOLE_PAYS // 3, HOLE_PAYS // 2, HOLE_PAYS - 2, HOLE_PAYS - 1):
        disk.data[place] = 1
        data = bytes(disk.data[:HOLE_PAYS])
        assert _read(client, nbd, HOLE_PAYS, 0) == [(data, 0, HOLE_PAYS)], place
        disk.data[place] = 0
    disk.result = bytearray
    assert _read(client, nbd, HOLE_PAYS, 0) == [(None, 0, HOLE_PAYS)]
    disk.result = lambda data: array.array("I", data)
    assert _read(client, nbd, HOLE_PAYS, 0) == [(None, 0, HOLE_PAYS)]
    disk.result = lambda data: data + b"more"
    assert _read(client, nbd, HOLE_PAYS, 0) == [(None, 0, HOLE_PAYS)]


def test_zeros_are_sent_as_they_are_in_a_simple_reply(server: RunningServer, disk: Disk) -> None:
    disk.data[:] = bytes(SIZE)
    with connection(server, structured=False) as client:
        client.ask(READ, 5, 0, HOLE_PAYS)
        assert client.simple(HOLE_PAYS) == (5, 0, bytes(HOLE_PAYS))


def test_dont_fragment_gives_one_chunk(
    server: RunningServer, disk: Disk, nbd: ModuleType, connect: Callable[..., Any]
) -> None:
    client = connect(server)
    assert client.can_df()
    assert _read(client, nbd, SIZE, 0, nbd.CMD_FLAG_DF) == [(bytes(disk.data), 0, SIZE)]
    disk.data[:] = bytes(SIZE)
    assert len(_read(client, nbd, SIZE, 0, nbd.CMD_FLAG_DF)) == 1


def test_a_failed_read_names_its_offset(
    server: RunningServer, disk: Disk, nbd: ModuleType, connect: Callable[..., Any]
) -> None:
    client = connect(server)
    seen = []

    def on_chunk(data: Any, at: int, status: int, error: Any) -> int:
        seen.append((at, status, error.value))
        return 0

    disk.failure = lambda: OSError(errno.ENOSPC, "full")
    with pytest.raises(nbd.Error) as caught:
        client.pread_structured(4096, 512, on_chunk)
    assert caught.value.errno == "ENOSPC"
    assert seen == [(512, nbd.READ_ERROR, errno.ENOSPC)]


def test_the_largest_read_and_write(nbd: ModuleType, connect: Callable[..., Any]) -> None:
    largest = 64 << 20
    written = []

    class Large(Device):
        def get_size(self) -> int:
            return 1 << 30

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return b"r" * count

        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            written.append((len(buf), bytes(buf[:1]), bytes(buf[-1:])))

    with pynbdkit.serve(Large) as server:
        client = connect(server)
        assert client.pread(largest, 0) == b"r" * largest
        client.pwrite(b"w" * largest, 0)
    assert written == [(largest, b"w", b"w")]


def test_a_silent_client_keeps_no_large_buffer_and_goes_on(
    sockdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silence may come between requests, and in the middle of one."""
    silent = threading.Semaphore(0)
    shrink = RequestParser.shrink
    large: list[bool] = []

    def noted(parser: RequestParser) -> None:
        shrink(parser)
        if not parser.partial:
            parser.space()
            large.append(parser.large)
        silent.release()

    monkeypatch.setattr(receiver, "LONG_SILENCE", 0.05)
    monkeypatch.setattr(RequestParser, "shrink", noted)
    plugin = pynbdkit.load_plugin("memory", size="1M")
    data = bytes(range(250)) * 1200
    with pynbdkit.serve(plugin, unix=str(sockdir / "s")) as server, Raw(str(sockdir / "s")) as raw:
        for _ in range(2):
            raw.send(raw.request(WRITE, 1, 0, len(data)) + data[:1000])
            assert silent.acquire(timeout=10)
            raw.send(data[1000:])
            assert raw.simple() == (1, 0, b"")
            while not large:
                assert silent.acquire(timeout=10)
            assert large == [False]
            large.clear()
            raw.ask(READ, 2, 0, len(data))
            assert raw.simple(len(data)) == (2, 0, data)
        assert server.connections == 1


# -- block status ----------------------------------------------------------------------------------


def _status(client: Any, count: int, offset: int, flags: int = 0) -> list[int]:
    entries: list[int] = []

    def on_extent(context: str, at: int, pairs: list[int], error: Any) -> int:
        assert context == "base:allocation"
        entries.extend(pairs)
        return 0

    client.block_status(count, offset, on_extent, flags)
    return entries


def test_block_status(
    server: RunningServer, disk: Disk, nbd: ModuleType, connect: Callable[..., Any]
) -> None:
    client = connect(server)
    half = SIZE // 2
    assert _status(client, SIZE, 0) == [half, 0, half, 3]
    assert _status(client, half, half - 10) == [10, 0, half - 10, 3]
    assert _status(client, SIZE, 0, nbd.CMD_FLAG_REQ_ONE) == [half, 0]
    assert disk.calls[-1] == ("extents", SIZE, 0, 4)
    disk.answer = [(0, 512, 0), (512, 512, 0), (1024, 512, 2)]  # neighbours are joined
    assert _status(client, SIZE, 0) == [1024, 0, 512, 2]
    disk.answer = [(512 * number, 512, 3 * (number % 2)) for number in range(2048)]
    assert len(_status(client, SIZE, 0)) == 2 * 2048


@pytest.mark.parametrize(
    "answer",
    [[(512, 512, 0)], [(0, 512, 0), (1024, 512, 3)], [(0, -1, 0)], [(0, 512, 7)], [(0, 512)],
     5, [None], ["abc"], [(0, 0, 0)], [(0, None, 0)]],
    ids=str,
)  # fmt: skip
def test_extents_that_cannot_be_are_the_plugins_mistake(
    server: RunningServer, disk: Disk, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.answer = answer
    with connection(server, context=True) as client:
        client.ask(STATUS, 5, 0, 4096)
        _, done, kind, body = client.chunk()
        assert (done, kind, body[:4]) == (1, ERROR, struct.pack(">I", EIO))
        still_serves(client, disk)
    assert "disks: extents: offset 0, count 4096" in capsys.readouterr().err


def test_without_extents_all_is_allocated(connect: Callable[..., Any]) -> None:
    class Plain(Device):
        def get_size(self) -> int:
            return SIZE

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

    with pynbdkit.serve(Plain) as server:
        assert _status(connect(server), SIZE, 0) == [SIZE, 0]


def test_long_answers_that_are_not_read_do_not_pile_up(server: RunningServer, disk: Disk) -> None:
    """A request of 28 bytes may have an answer of some hundred kilobytes."""
    disk.get_size = lambda: 1 << 30  # type: ignore[method-assign]
    disk.answer = [(512 * number, 512, 3 * (number % 2)) for number in range(1 << 12)]
    with connection(server, context=True) as client:
        client.sock.settimeout(1.0)
        one = client.request(STATUS, 1, 0, 1 << 30)
        try:
            while True:
                client.send(one * 100)
        except TimeoutError:
            pass
        (served,) = server._server._connections
        transmission = served._transmission
        assert transmission is not None
        waiting = sum(map(len, transmission.runner.ready))
        assert waiting < 2 << 20
        assert 1 <= len(disk.calls) < 100


def test_block_status_without_a_context_is_refused(server: RunningServer, disk: Disk) -> None:
    with connection(server) as client:
        assert fails_with(client, STATUS, True)[0] == EINVAL
        assert disk.calls == []
        still_serves(client, disk)


# -- flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [READ, FLUSH, CACHE, STATUS])
def test_fua_has_no_effect_where_nothing_is_written(
    server: RunningServer, disk: Disk, kind: int
) -> None:
    with connection(server, context=True) as client:
        for flags in (0, FUA):
            ask(client, kind, 5, flags)
            if kind in (READ, STATUS):
                assert client.chunk()[:3] == (5, 1, DATA if kind == READ else BLOCK_STATUS)
            else:
                assert client.simple() == (5, 0, b"")
    plain, with_fua = disk.calls
    assert plain == with_fua


@pytest.mark.parametrize("kind", list(COMMANDS))
def test_fua_that_was_not_offered_is_refused(disk: Disk, kind: int) -> None:
    disk.fua = Fua.NONE
    with (
        pynbdkit.serve(Disks(disk)) as server,
        connection(server, context=True) as client,
    ):
        assert fails_with(client, kind, True, flags=FUA)[0] == EINVAL
        assert disk.calls == []
        still_serves(client, disk)


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [(WRITE, 0, 0), (WRITE, FUA, 2), (TRIM, 0, 0), (TRIM, FUA, 2), (ZEROES, 0, 1),
     (ZEROES, NO_HOLE, 0), (ZEROES, FUA, 3), (ZEROES, FUA | NO_HOLE | FAST_ZERO, 10),
     (ZEROES, FAST_ZERO, 9), (READ, DF, 0), (STATUS, REQ_ONE, 4)],
)  # fmt: skip
def test_flags_as_the_plugin_sees_them(
    server: RunningServer, disk: Disk, kind: int, flags: int, expected: int
) -> None:
    with connection(server, context=True) as client:
        ask(client, kind, 5, flags)
        _ = client.chunk() if kind in (READ, STATUS) else client.simple()
    name, offset, count = COMMANDS[kind]
    what = b"w" * count if kind == WRITE else count
    assert disk.calls == [(name, what, offset, expected)]


@pytest.mark.parametrize("mode", [CacheMode.NONE, CacheMode.EMULATE, CacheMode.NATIVE])
def test_cache(disk: Disk, mode: int) -> None:
    disk.can_cache = lambda: mode  # type: ignore[method-assign]
    with pynbdkit.serve(Disks(disk)) as server, connection(server, structured=False) as client:
        assert bool(client.flags & 1 << 10) == (mode != CacheMode.NONE)
        client.ask(CACHE, 5, 0, SIZE)
        assert client.simple() == (5, EINVAL if mode == CacheMode.NONE else 0, b"")
    read = sum(call[1] for call in disk.calls if call[0] == "pread")
    assert read == (SIZE if mode == CacheMode.EMULATE else 0)
    assert (("cache", SIZE, 0, 0) in disk.calls) == (mode == CacheMode.NATIVE)


def test_the_buffer_of_a_write_is_a_view_of_exactly_its_bytes(
    server: RunningServer, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def pwrite(buf: Any, offset: int, flags: int) -> None:
        seen.append((type(buf), buf.nbytes, bytes(buf), offset))

    disk.pwrite = pwrite  # type: ignore[method-assign]
    with connection(server, structured=False) as client:
        payloads = [bytes([number]) * (1 + number * 37) for number in range(100)]
        client.send(
            b"".join(
                client.request(WRITE, number, number, len(data)) + data
                for number, data in enumerate(payloads)
            )
        )
        assert {client.simple()[:2] for _ in payloads} == {(n, 0) for n in range(100)}
    expected = {(memoryview, len(data), data, n) for n, data in enumerate(payloads)}
    assert set(seen) == expected
    assert len(seen) == len(expected)


# -- the order of replies --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        ThreadModel.SERIALIZE_CONNECTIONS,
        ThreadModel.SERIALIZE_ALL_REQUESTS,
        ThreadModel.SERIALIZE_REQUESTS,
    ],
)
def test_replies_come_in_order_unless_all_layers_are_parallel(disk: Disk, model: int) -> None:
    """Whatever the requests are, and whichever of them fail."""
    plugin = Disks(disk)
    plugin.thread_model = model
    with pynbdkit.serve(plugin) as server, connection(server, structured=False) as client:
        kinds = [READ, WRITE, FLUSH, TRIM, ZEROES, CACHE, STATUS, 77]
        flags = [0, FUA, 0, FUA | DF]
        asked = []
        for cookie in range(400):
            kind = kinds[cookie * 5 % 8]
            flag = flags[cookie % 4]
            count = 16 if kind != FLUSH else 0
            client.ask(kind, cookie, 0, count, flag, b"x" * 16 if kind == WRITE else b"")
            asked.append((cookie, kind))
        for cookie, kind in asked:
            got, error, _ = client.simple()
            assert got == cookie
            if kind == READ and not error:
                client.receive(16)


@pytest.mark.parametrize(
    "model",
    [
        ThreadModel.SERIALIZE_CONNECTIONS,
        ThreadModel.SERIALIZE_ALL_REQUESTS,
        ThreadModel.SERIALIZE_REQUESTS,
    ],
)
def test_writes_that_could_be_grouped_keep_their_order_all_the_same(disk: Disk, model: int) -> None:
    def pwrite_group(writes: Sequence[tuple[Any, int]]) -> bool:
        disk.calls.append(("pwrite_group", len(writes)))
        return True

    disk.pwrite_group = pwrite_group  # type: ignore[method-assign]
    plugin = Disks(disk)
    plugin.thread_model = model
    with pynbdkit.serve(plugin) as server, connection(server, structured=False) as client:
        message = b""
        for cookie in range(0, 200, 4):
            message += client.request(WRITE, cookie, cookie, 8, FUA) + b"x" * 8
            message += client.request(WRITE, cookie + 1, cookie, 8, FUA) + b"x" * 8
            message += client.request(READ, cookie + 2, cookie, 8)
            message += client.request(TRIM, cookie + 3, cookie, 8)
        for cookie in range(200, 300, 2):
            message += client.request(WRITE, cookie, cookie, 8, FUA) + b"x" * 8
            message += client.request(WRITE, cookie + 1, SIZE, 8, FUA) + b"x" * 8
        for cookie in range(300, 400, 2):
            message += client.request(WRITE, cookie, cookie, 8, FUA) + b"x" * 8
            message += client.request(WRITE, cookie + 1, cookie, 8) + b"x" * 8
        client.send(message)
        for cookie in range(400):
            assert client.simple(8 if cookie < 200 and cookie % 4 == 2 else 0)[0] == cookie


def test_a_reply_may_overtake_another_where_all_is_parallel() -> None:
    release = threading.Event()

    class Slow(Disk):
        blocking = True

        def pread(self, count: int, offset: int, flags: int) -> bytes:
            if offset == 0:
                assert release.wait(20)
            return bytes(count)

    with pynbdkit.serve(Disks(Slow())) as server, connection(server, structured=False) as client:
        client.ask(READ, 1, 0, 16)
        client.ask(READ, 2, 512, 16)
        assert client.simple(16)[0] == 2
        release.set()
        assert client.simple(16)[0] == 1


# -- a socket that takes what it likes -------------------------------------------------------------


class Reluctant:
    """A socket, as far as Transmission knows one: gives `requests`, takes few bytes at a time."""

    def __init__(self, requests: bytes, takes: Iterable[int]) -> None:
        self.requests = requests
        self.takes = iter(takes)
        self.sent = bytearray()

    def recv_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self.requests))
        buffer[:count] = self.requests[:count]
        self.requests = self.requests[count:]
        return count

    def sendmsg(self, pieces: list[Any]) -> int:
        assert len(pieces) <= os.sysconf("SC_IOV_MAX")
        data = b"".join(bytes(piece) for piece in pieces)
        count = min(len(data), next(self.takes))
        self.sent += data[:count]
        return count

    def shutdown(self, how: int) -> None:
        raise AssertionError(how)


@pytest.mark.parametrize("name", list(BUFFERS))
@pytest.mark.parametrize("takes", [1, 15, 16, 17, 500, 65536])
def test_a_socket_that_takes_part_of_the_replies_gets_all_of_them(name: str, takes: int) -> None:
    disk = Disk()
    disk.blocking = False
    disk.result = BUFFERS[name]
    kinds = [(READ, 8 * (cookie % 5 + 1)) for cookie in range(20)]
    requests = b"".join(
        Raw.request(kind, cookie, cookie, count) for cookie, (kind, count) in enumerate(kinds)
    )
    expected = b"".join(
        struct.pack(">IIQ", 0x67446698, 0, cookie) + disk.data[cookie : cookie + count]
        for cookie, (_, count) in enumerate(kinds)
    )
    sock = Reluctant(requests, iter(lambda: takes, 0))
    transmission = bare_transmission(sock, disk)
    assert transmission.run() == ""
    assert sock.sent == expected


def test_more_replies_than_one_gather_write_takes(server: RunningServer, disk: Disk) -> None:
    with connection(server, structured=False) as client:
        count = 3000
        sender = threading.Thread(
            target=client.send,
            args=(b"".join(client.request(READ, n, n, 3) for n in range(count)),),
        )
        sender.start()
        replies = {}
        for _ in range(count):
            cookie, error, data = client.simple(3)
            assert error == 0
            replies[cookie] = data
        sender.join()
    assert replies == {n: bytes(disk.data[n : n + 3]) for n in range(count)}


def test_requests_and_the_end_in_one_go(server: RunningServer, disk: Disk) -> None:
    """A client that shuts its side down after its requests gets every reply."""
    with connection(server, structured=False) as client:
        client.send(b"".join(client.request(READ, n, n, 8) for n in range(50)))
        client.sock.shutdown(socket.SHUT_WR)
        got = {client.simple(8)[0] for _ in range(50)}
        assert got == set(range(50))
        assert client.at_end()
