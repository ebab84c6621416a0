"""The delay filter: who waits, for how long, and that nobody waits for nothing."""

from __future__ import annotations

import errno
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import ConfigError, Device, Flag, Session
from pynbdkit.chain import Chain
from pynbdkit.filters.delay import DelayFilter
from pynbdkit.parameters import Configurable

FOREVER = 1000.0
"""A delay in seconds that no test sits through."""


class Disk(Device):
    """Has everything, and says what it was asked to do."""

    def __init__(self, events: list[Any] | None = None) -> None:
        self.events: list[Any] = [] if events is None else events

    def get_size(self) -> int:
        return 1 << 20

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        self.events.append("pread")
        return bytes(count)

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self.events.append("pwrite")

    def flush(self, flags: int) -> None:
        self.events.append("flush")

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.events.append("trim")

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.events.append("zero")

    def cache(self, count: int, offset: int, flags: int) -> None:
        self.events.append("cache")

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        self.events.append("extents")
        return [(offset, count, 0)]

    def close(self) -> None:
        self.events.append("close")


class DiskPlugin(pynbdkit.Plugin):
    name = "disk"

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def open(self, session: Session) -> Device:
        self.events.append("open")
        return Disk(self.events)


OPERATIONS: dict[str, tuple[Any, ...]] = {
    "pread": (512, 0, 0),
    "pwrite": (b"x", 0, Flag.FUA),
    "flush": (0,),
    "trim": (512, 0, 0),
    "zero": (512, 0, Flag.MAY_TRIM),
    "cache": (512, 0, 0),
    "extents": (512, 0, 0),
}


def everything(config: list[str], *, interrupted: bool = False) -> list[Any]:
    """Open, call every operation, close: the seconds slept and the names called, in order."""
    events: list[Any] = []

    def sleep(seconds: float) -> bool:
        events.append(seconds)
        return interrupted

    delay = DelayFilter()
    chain = Chain(DiskPlugin(events), [delay])
    for word in config:
        chain.config(*word.split("=", 1))
    chain.complete()
    layer = chain.open(Session(stopping=sleep))
    for name, arguments in OPERATIONS.items():
        try:
            getattr(layer, name)(*arguments)
        except OSError as error:
            events.append(f"{name}: {errno.errorcode[error.errno or 0]}")
    layer.close()
    return events


NO_DELAY = ["open", "pread", "pwrite", "flush", "trim", "zero", "cache", "extents", "close"]


def delayed(**seconds: float) -> list[Any]:
    """NO_DELAY with sleeps before these."""
    events: list[Any] = []
    for name in NO_DELAY:
        if name in seconds:
            events.append(seconds[name])
        events.append(name)
    # A FUA write is followed by the flush of its layer, which is part of the write.
    events.insert(events.index("pwrite") + 1, "flush")
    return events


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ([], delayed()),
        (["rdelay=100ms"], delayed(pread=0.1)),
        (["delay-read=2"], delayed(pread=2.0)),
        (["delay-write=100ms"], delayed(pwrite=0.1)),
        (["delay-zero=1"], delayed(zero=1.0)),
        (["delay-trim=1"], delayed(trim=1.0)),
        (["delay-extents=1"], delayed(extents=1.0)),
        (["delay-cache=1"], delayed(cache=1.0)),
        (["delay-open=1"], delayed(open=1.0)),
        (["delay-close=1"], delayed(close=1.0)),
        (["wdelay=3"], delayed(pwrite=3.0, trim=3.0, zero=3.0)),
        (["wdelay=3", "delay-zero=1"], delayed(pwrite=3.0, trim=3.0, zero=1.0)),
        (["delay-zero=1", "wdelay=3"], delayed(pwrite=3.0, trim=3.0, zero=3.0)),
        (["rdelay=1", "delay-read=0"], delayed()),
        (["delay-zero=1", "delay-fast-zero=no"], delayed(zero=1.0)),
    ],
)
def test_who_waits(config: list[str], expected: list[Any]) -> None:
    """Each key delays its own operations, before they are called, and no other."""
    assert everything(config) == expected


def test_calls_are_said_to_wait() -> None:
    """So the server has threads for them from the first request on."""
    assert Chain(DiskPlugin([]), [DelayFilter()]).open(Session()).may_block() is True


def test_interrupted_sleep_calls_nothing() -> None:
    """The server stops: what waits fails with ESHUTDOWN; closing goes on."""
    events = everything(["rdelay=5", "wdelay=5", "delay-close=5"], interrupted=True)
    assert events == [
        *("open", 5.0, "pread: ESHUTDOWN", 5.0, "pwrite: ESHUTDOWN", "flush"),
        *(5.0, "trim: ESHUTDOWN", 5.0, "zero: ESHUTDOWN", "cache", "extents", 5.0, "close"),
    ]


@pytest.mark.parametrize(
    ("config", "slept", "refused"),
    [
        ({"delay_zero": "1"}, [1.0], False),
        ({"delay_zero": "1", "delay_fast_zero": "true"}, [1.0], False),
        ({"delay_zero": "1", "delay_fast_zero": "false"}, [], True),
        ({"wdelay": "1", "delay_fast_zero": "false"}, [], True),
        ({"delay_fast_zero": "false"}, [], False),  # zero is as fast as ever
    ],
)
def test_fast_zero(config: dict[str, str], slept: list[float], refused: bool) -> None:
    events: list[Any] = []
    sleeps: list[float] = []
    chain = Chain(DiskPlugin(events), [DelayFilter(**config)])

    def sleep(seconds: float) -> bool:
        sleeps.append(seconds)
        return False

    layer = chain.open(Session(stopping=sleep))
    assert layer.can_fast_zero()
    if refused:
        with pytest.raises(OSError, match="delay-fast-zero") as caught:
            layer.zero(512, 0, Flag.FAST_ZERO)
        assert caught.value.errno == errno.EOPNOTSUPP
    else:
        layer.zero(512, 0, Flag.FAST_ZERO)
    assert sleeps == slept
    assert events == (["open"] if refused else ["open", "zero"])


def test_fast_zero_on_the_wire(nbd: Any, connect: Callable[..., Any]) -> None:
    """The client gets ENOTSUP for a fast zero, and its other zeroes."""
    delay = DelayFilter(delay_zero="1ms", delay_fast_zero="false")
    with pynbdkit.serve(Disk, filters=[delay]) as server:
        client = connect(server)
        with pytest.raises(nbd.Error) as caught:
            client.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert caught.value.errnum == errno.ENOTSUP
        client.zero(512, 0)


def test_reads_wait_on_the_wire(connect: Callable[..., Any]) -> None:
    with pynbdkit.serve(Disk, filters=[DelayFilter(rdelay="150ms")]) as server:
        client = connect(server)
        start = time.monotonic()
        client.pread(512, 0)
        assert time.monotonic() - start >= 0.15


def finish(client: Any, cookies: list[int]) -> None:
    """Wait until these commands are complete; raises the first error."""
    while cookies := [cookie for cookie in cookies if not client.aio_command_completed(cookie)]:
        client.poll(-1)


def test_requests_wait_side_by_side(nbd: Any, connect: Callable[..., Any]) -> None:
    """Eight reads at once take far less than eight delays."""
    with pynbdkit.serve(Disk, filters=[DelayFilter(rdelay="500ms")]) as server:
        client = connect(server)
        start = time.monotonic()
        cookies = [client.aio_pread(nbd.Buffer(512), 512 * number) for number in range(8)]
        finish(client, cookies)
        assert 0.5 <= time.monotonic() - start < 4.0


def test_stop_is_not_delayed(nbd: Any, connect: Callable[..., Any]) -> None:
    """A read that would wait for long is answered with ESHUTDOWN when the server stops."""
    delay = DelayFilter(delay_read=FOREVER, delay_close=FOREVER)
    started = threading.Event()
    events: list[Any] = []
    plugin = DiskPlugin(events)
    with pynbdkit.serve(plugin, filters=[Waiting(started), delay]) as server:
        client = connect(server)
        cookie = client.aio_pread(nbd.Buffer(512), 0)
        while not started.is_set():
            client.poll(100)
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 30
        with pytest.raises(nbd.Error) as caught:
            finish(client, [cookie])
        assert caught.value.errnum == errno.ESHUTDOWN
    assert events == ["open", "close"]


class Waiting(pynbdkit.Filter):
    """Says when a read has begun."""

    blocking = None

    def __init__(self, started: threading.Event) -> None:
        super().__init__()
        self.started = started

    def open(self, next: Callable[[Session], pynbdkit.Layer], session: Session) -> Device:
        below = next(session)
        started = self.started

        class Reads(pynbdkit.FilterDevice):
            def pread(self, count: int, offset: int, flags: int) -> Any:
                started.set()
                return self.next.pread(count, offset, flags)

        return Reads(below)


BOTH_FAMILIES = pytest.mark.parametrize("tcp", [None, ("127.0.0.1", 0)], ids=["unix", "tcp"])


@BOTH_FAMILIES
def test_orderly_close_waits(nbd: Any, tcp: tuple[str, int] | None) -> None:
    """A client that says goodbye waits for the server, which waits."""
    with pynbdkit.serve(Disk, filters=[DelayFilter(delay_close="300ms")], tcp=tcp) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        start = time.monotonic()
        client.shutdown()
        assert time.monotonic() - start >= 0.3


@BOTH_FAMILIES
def test_a_client_that_is_gone_is_not_waited_for(nbd: Any, tcp: tuple[str, int] | None) -> None:
    """Neither its close nor its requests hold the connection's resources."""
    closed = threading.Event()

    class Closes(Disk):
        def close(self) -> None:
            closed.set()

    delay = DelayFilter(delay_close=FOREVER, delay_read=FOREVER)
    with pynbdkit.serve(Closes, filters=[delay], tcp=tcp) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.aio_pread(nbd.Buffer(512), 0)
        del client  # closes its socket without a word
        assert closed.wait(30)


def nbdkit_takes(word: str) -> bool:
    done = subprocess.run(
        [support.program("nbdkit"), "-U", "-", "--filter=delay", "null", word, "--run", "true"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


MANUAL = """rdelay delay-read delay-write delay-zero delay-trim delay-extents delay-cache wdelay
    delay-fast-zero delay-open delay-close"""


@pytest.mark.parametrize("key", MANUAL.split())
def test_keys_of_the_manual_page(key: str) -> None:
    assert nbdkit_takes(f"{key}=1")
    assert DelayFilter().config(key, "1")


def test_no_other_keys() -> None:
    declared: dict[str, Any] = Configurable._declared | DelayFilter._declared
    assert set(declared) == set(MANUAL.split())
    assert not DelayFilter().config("delay-flush", "1")


@pytest.mark.parametrize("value", ["0", "1", "0x10", "010", " 1", "10ms", "100000"])
def test_values_that_nbdkit_takes(value: str) -> None:
    assert nbdkit_takes(f"rdelay={value}")
    DelayFilter().config("rdelay", value)


@pytest.mark.parametrize("value", ["", "-1", "1kg", "1MS", "ms", "nan", "inf", "2147483648"])
def test_values_that_nbdkit_refuses(value: str) -> None:
    if value != "ms":  # nbdkit reads that as 0 milliseconds
        assert not nbdkit_takes(f"rdelay={value}")
    with pytest.raises(ConfigError, match=r"^rdelay: "):
        DelayFilter().config("rdelay", value)
