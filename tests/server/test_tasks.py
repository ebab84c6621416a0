"""Requests of an asynchronous plugin: over sockets, on asyncio's loop and on uvloop's.

What must happen at once is shown by calls that wait for a gate; what must not is looked at for a
moment (`NOT_YET`).
"""

from __future__ import annotations

import asyncio
import errno
import random
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from certificates import Certificates, certificates
from pynbdkit import Device, Filter, FilterDevice, Plugin, RunningServer, Session, log
from pynbdkit.complete import Layer
from pynbdkit.server import tasks
from pynbdkit.server.crew import BUDGET
from pynbdkit.session import current
from raw import FLUSH, READ, STATUS, WRITE, ZEROES, Raw

__all__ = ["certificates"]

SIZE = 64 << 20
WAIT = 20.0
NOT_YET = 0.05
CONNECTIONS, ALL_REQUESTS, REQUESTS, PARALLEL = range(4)
EIO, ENOSPC, EPERM, ENOMEM = 5, 28, 1, 12


class Counter:
    """How many are inside at once, and the most that there ever were; for any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.inside = 0
        self.highest = 0
        self.left = 0

    def __enter__(self) -> None:
        with self._changed:
            self.inside += 1
            self.highest = max(self.highest, self.inside)
            self._changed.notify_all()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.inside -= 1
            self.left += 1
            self._changed.notify_all()

    def reaches(self, count: int, seconds: float = WAIT) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.inside >= count, seconds)


class Gated(Plugin):
    """One disk of memory for all; while the gate is shut, all calls wait at it."""

    name = "gated"

    def __init__(self, model: int = PARALLEL) -> None:
        super().__init__()
        self.thread_model = model
        self.calls = Counter()
        self.events: list[Any] = []
        self.data = bytearray(random.Random(1).randbytes(1 << 20) * (SIZE >> 20))
        self.hook: Callable[[int], Any] | None = None

    async def after_fork(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self, session: Session) -> Device:
        assert asyncio.get_running_loop() is self.loop
        assert current() is not None
        return GatedDisk(self)

    async def cleanup(self) -> None:
        assert asyncio.get_running_loop() is self.loop
        self.events.append("cleanup")

    def shut(self) -> None:
        self._at_gate(self.gate.clear)

    def release(self) -> None:
        self._at_gate(self.gate.set)

    def _at_gate(self, action: Callable[[], None]) -> None:
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        try:
            self.loop.call_soon_threadsafe(act)
        except RuntimeError:
            assert self.loop.is_closed()  # the server has ended before us (exitlast)
            return
        deadline = time.monotonic() + WAIT
        while not done.wait(0.01) and not self.loop.is_closed():
            assert time.monotonic() < deadline


class GatedDisk(Device):
    def __init__(self, plugin: Gated) -> None:
        self.plugin = plugin

    async def get_size(self) -> int:
        await asyncio.sleep(0)
        return SIZE

    async def _pass(self, offset: int) -> None:
        with self.plugin.calls:
            if self.plugin.hook is not None:
                self.plugin.hook(offset)
            await self.plugin.gate.wait()
            await asyncio.sleep(0)

    async def pread(self, count: int, offset: int, flags: int) -> Any:
        await self._pass(offset)
        return bytes(self.plugin.data[offset : offset + count])

    async def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        await self._pass(offset)
        self.plugin.data[offset : offset + len(buf)] = buf

    async def flush(self, flags: int) -> None:
        self.plugin.events.append("flush")

    async def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        await asyncio.sleep(0)
        return [(0, SIZE // 2, 0), (SIZE // 2, SIZE // 2, 3)]

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.plugin.events.append("close")


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def _loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    else:
        support.need_uvloop()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(log, "_sink", found.append)
    monkeypatch.setattr(log, "_seen", set())
    return found


@pytest.fixture
def plugin() -> Gated:
    return Gated()


@contextmanager
def serving(plugin: Gated, **options: Any) -> Iterator[RunningServer]:
    with pynbdkit.serve(plugin, **options) as server:
        try:
            yield server
        finally:
            plugin.release()


def client_of(server: RunningServer) -> Raw:
    assert server.socket is not None
    return Raw(server.socket)


def transmissions(server: RunningServer) -> list[Any]:
    return [connection._transmission for connection in server._server._connections]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def read_ok(client: Raw, offset: int, plugin: Gated) -> None:
    client.ask(READ, offset, offset, 512)
    assert client.simple(512) == (offset, 0, bytes(plugin.data[offset : offset + 512]))


# -- many at once ----------------------------------------------------------------------------------


def test_a_thousand_in_flight_need_no_threads(plugin: Gated) -> None:
    before = threading.active_count()
    with serving(plugin) as server, client_of(server) as client:
        read_ok(client, 0, plugin)
        plugin.shut()
        for cookie in range(1000):
            client.ask(READ, cookie, 512 * cookie, 512)
        assert plugin.calls.reaches(1000)
        # accept, the connection's own, the loop's, and the one that watches it
        assert threading.active_count() - before <= 4
        plugin.release()
        found = {}
        for _ in range(1000):
            cookie, error, data = client.simple(512)
            assert error == 0
            found[cookie] = data
    assert found == {n: bytes(plugin.data[512 * n : 512 * n + 512]) for n in range(1000)}
    assert threading.active_count() == before


def test_no_more_than_the_bound(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        plugin.shut()
        count = tasks.MOST + 300
        client.send(b"".join(client.request(READ, n, 0, 8) for n in range(count)))
        assert plugin.calls.reaches(tasks.MOST)
        assert not plugin.calls.reaches(tasks.MOST + 1, NOT_YET)
        plugin.release()
        assert {client.simple(8)[0] for _ in range(count)} == set(range(count))


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_no_more_bytes_than_the_budget(plugin: Gated, kind: int) -> None:
    count, most = 1 << 20, BUDGET >> 20
    with serving(plugin) as server, client_of(server) as client:
        plugin.shut()
        payload = bytes(count) if kind == WRITE else b""
        message = b"".join(client.request(kind, n, 0, count) + payload for n in range(most + 8))
        sender = threading.Thread(target=client.send, args=(message,))
        sender.start()
        assert plugin.calls.reaches(most)
        assert not plugin.calls.reaches(most + 1, NOT_YET)
        plugin.release()
        for _ in range(most + 8):
            assert client.simple(count if kind == READ else 0)[1] == 0
        sender.join()
    assert plugin.calls.highest == most


def test_one_request_may_be_larger_than_the_budget(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        client.sock.settimeout(60)
        client.ask(READ, 1, 0, BUDGET + 512)
        cookie, error, data = client.simple(BUDGET + 512)
        assert (cookie, error) == (1, 0)
        assert data == plugin.data[: BUDGET + 512]


def test_connections_share_the_loop(plugin: Gated) -> None:
    """And each task sees its own session."""
    seen: dict[int, Session | None] = {}
    plugin.hook = lambda offset: seen.update({offset: current()})
    with serving(plugin) as server:
        clients = [client_of(server) for _ in range(16)]
        plugin.shut()
        for number, client in enumerate(clients):
            for _ in range(64):
                client.ask(READ, 7, number * 512, 512)
        assert plugin.calls.reaches(16 * 64)
        plugin.release()
        for client in clients:
            for _ in range(64):
                assert client.simple(512)[1] == 0
        assert len(set(seen.values())) == 16
        for client in clients:
            client.close()


@pytest.mark.parametrize("connections", [1, 16])
def test_libnbd_at_depth_64(nbd: ModuleType, plugin: Gated, connections: int) -> None:
    """Random writes and reads of one's own part, all of them right."""
    with serving(plugin) as server:

        def run(number: int) -> None:
            chance = random.Random(number)
            client = nbd.NBD()
            client.connect_uri(server.uri)
            part, depth = 1 << 20, 64
            base = number * part
            expected = {}
            slots = list(range(depth))
            for _ in range(4):
                chance.shuffle(slots)
                cookies = []
                for slot in slots:
                    data = chance.randbytes(4096)
                    expected[slot] = data
                    buffer = nbd.Buffer.from_bytearray(bytearray(data))
                    cookies.append(client.aio_pwrite(buffer, base + slot * 4096))
                wait(client, cookies)
                buffers = {slot: nbd.Buffer(4096) for slot in slots}
                wait(client, [client.aio_pread(b, base + s * 4096) for s, b in buffers.items()])
                for slot, found in buffers.items():
                    assert found.to_bytearray() == expected[slot]
            client.shutdown()

        def wait(client: Any, cookies: list[int]) -> None:
            for cookie in cookies:
                while not client.aio_command_completed(cookie):
                    client.poll(-1)

        failures = in_threads(connections, run)
    assert failures == []


def in_threads(count: int, work: Callable[[int], None]) -> list[BaseException]:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return failures


def test_slow_requests_cost_next_to_nothing(nbd: ModuleType) -> None:
    """256 at a time, 10 ms each: 5,000 of them take some tenths of a second, and little work."""

    class Slow(Device):
        def get_size(self) -> int:
            return SIZE

        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            await asyncio.sleep(0.01)
            return bytes(count)

    with pynbdkit.serve(Slow) as server, client_of(server) as client:
        client.ask(READ, 0, 0, 512)
        client.simple(512)
        before = resource.getrusage(resource.RUSAGE_SELF)
        requests = 20 * 256
        for start in range(0, requests, 256):
            client.send(b"".join(client.request(READ, n, 0, 8) for n in range(256)))
            client.receive(256 * 24)
            assert start < requests
        after = resource.getrusage(resource.RUSAGE_SELF)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert work / requests < 200e-6  # a thread's switches alone would cost as much


# -- what is passed --------------------------------------------------------------------------------


def test_a_payload_stays_what_it_was(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        plugin.shut()
        client.ask(WRITE, 1, 0, 4096, payload=b"A" * 4096)
        assert plugin.calls.reaches(1)
        for cookie in range(2, 700):
            client.ask(WRITE, cookie, 8192, 4096, payload=b"B" * 4096)
        assert plugin.calls.reaches(699)
        plugin.release()
        for _ in range(699):
            assert client.simple()[1] == 0
    assert plugin.data[:4096] == b"A" * 4096


def test_fua_is_a_flush_before_the_answer(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        client.ask(WRITE, 1, 0, 512, 1, b"x" * 512)
        assert client.simple() == (1, 0, b"")
        assert plugin.events == ["flush"]
        client.ask(ZEROES, 2, 0, 2 << 20, 1)
        assert client.simple() == (2, 0, b"")
        assert plugin.events == ["flush"] * 2
        client.ask(FLUSH, 3)
        assert client.simple() == (3, 0, b"")
        assert plugin.events == ["flush"] * 3
    assert plugin.data[: 2 << 20] == bytes(2 << 20)
    assert plugin.events == ["flush"] * 3 + ["close", "cleanup"]


@pytest.mark.parametrize("extended", [False, True])
def test_block_status(plugin: Gated, extended: bool) -> None:
    with serving(plugin) as server:
        assert server.socket is not None
        client = Raw(
            server.socket, structured=True, extended=extended, contexts=("base:allocation",)
        )
        client.ask(STATUS, 1, SIZE // 2 - 512, 1024)
        if extended:
            data = client.extended_chunk()[4]
            assert struct.unpack(">IIQQQQ", data)[2:] == (512, 0, 512, 3)
        else:
            data = client.chunk()[3]
            assert struct.unpack(">IIIII", data)[1:] == (512, 0, 512, 3)
        client.close()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), ENOSPC),
        (PermissionError(errno.EROFS, "no"), EPERM),
        (ValueError("what"), EIO),
        (MemoryError(), ENOMEM),
        (SystemExit(1), EIO),
        (KeyboardInterrupt(), EIO),
        (asyncio.CancelledError(), EIO),
        (TimeoutError(), EIO),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors(plugin: Gated, lines: list[str], failure: BaseException, expected: int) -> None:
    def fail(offset: int) -> None:
        if offset == 512:
            raise failure

    plugin.hook = fail
    with serving(plugin) as server, client_of(server) as client:
        for kind in (READ, WRITE):
            client.ask(kind, 1, 512, 8, payload=b"12345678" if kind == WRITE else b"")
            assert client.simple() == (1, expected, b"")
            read_ok(client, 1024, plugin)
    assert sum("error: " in line for line in lines) == 2
    assert "gated[1]: error: gated: pread: offset 512, count 8" in lines[0]


def test_a_read_that_is_too_short(lines: list[str]) -> None:
    class Short(Device):
        def get_size(self) -> int:
            return SIZE

        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count - 1)

    with pynbdkit.serve(Short) as server, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        assert client.simple() == (1, EIO, b"")
    assert "7 bytes instead of 8" in lines[0]


def test_what_must_be_refused_is(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        client.ask(READ, 1, SIZE, 8)
        assert client.simple() == (1, 22, b"")
        client.ask(WRITE, 2, SIZE - 4, 8, payload=bytes(8))
        assert client.simple() == (2, ENOSPC, b"")
        client.ask(99, 3, 0, 8)
        assert client.simple() == (3, 22, b"")
        read_ok(client, 0, plugin)


def test_a_synchronous_call_from_a_coroutine_is_an_error(lines: list[str]) -> None:
    """Not a server that waits for itself for good."""

    class Plug(Plugin):
        name = "plug"

        def open(self, session: Session) -> Device:
            return Disk()

    class Disk(Device):
        def get_size(self) -> int:
            return SIZE

        async def pread(self, count: int, offset: int, flags: int) -> bytes:
            (transmission,) = transmissions(server)
            return transmission.runner._layer.pread(count, offset, flags)  # type: ignore[no-any-return]

    with pynbdkit.serve(Plug()) as server, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        assert client.simple() == (1, EIO, b"")
    assert "called in the event loop's own thread" in lines[0]


# -- thread models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [CONNECTIONS, ALL_REQUESTS, REQUESTS])
def test_serialized_models(model: int) -> None:
    plugin = Gated(model)
    clients: list[Raw] = []

    def run(number: int) -> None:
        assert server.socket is not None
        client = Raw(server.socket)
        clients.append(client)
        client.send(b"".join(client.request(READ, n, 512 * n, 512) for n in range(30)))
        for cookie in range(30):
            found = client.simple(512)
            assert found == (cookie, 0, bytes(plugin.data[512 * cookie : 512 * cookie + 512]))
        client.close()

    with serving(plugin) as server:
        if model == REQUESTS:  # one of each connection: they meet at the gate
            plugin.shut()

            def open_gate() -> None:
                plugin.calls.reaches(3)
                plugin.release()

            threading.Thread(target=open_gate).start()
        assert in_threads(3, run) == []
    assert plugin.calls.highest == (3 if model == REQUESTS else 1)


def test_one_thread_is_no_bound(plugin: Gated) -> None:
    with serving(plugin, threads=1) as server, client_of(server) as client:
        plugin.shut()
        for cookie in range(100):
            client.ask(READ, cookie, 0, 8)
        assert plugin.calls.reaches(100)


# -- filters ---------------------------------------------------------------------------------------


class Counting(Filter):
    """Changes reads alone."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        calls = self.calls

        class Disk(FilterDevice):
            def pread(self, count: int, offset: int, flags: int) -> Any:
                assert current() is not None
                with calls:
                    return self.next.pread(count, offset, flags)

        return Disk(next(session))


def test_what_a_filter_changes_runs_in_threads(plugin: Gated) -> None:
    """The rest does not: reads wait in all of the threads, and writes still run."""
    counting = Counting()
    with (
        serving(plugin, filters=[counting, "exitlast"], threads=4) as server,
        client_of(server) as client,
    ):
        plugin.shut()
        for cookie in range(60):
            client.ask(READ, cookie, 512 * cookie, 512)
        assert counting.calls.reaches(4)
        assert not counting.calls.reaches(5, NOT_YET)
        for cookie in range(60, 100):
            client.ask(WRITE, cookie, 1 << 20, 512, payload=bytes(512))
        assert plugin.calls.reaches(44)
        plugin.release()
        seen = set()
        for _ in range(100):
            _, error, cookie = struct.unpack(">IIQ", client.receive(16))
            assert error == 0
            seen.add(cookie)
            if cookie < 60:
                expected = plugin.data[512 * cookie : 512 * cookie + 512]
                assert client.receive(512) == expected
    assert seen == set(range(100))


@pytest.mark.parametrize("name", ["cow", "log", "fua"])
def test_our_filters_over_a_plugin_of_coroutines(
    nbd: ModuleType, plugin: Gated, name: str, tmp_path: Any
) -> None:
    options = {"cow": {}, "log": {"logfile": str(tmp_path / "log")}, "fua": {"fuamode": "emulate"}}
    with serving(plugin, filters=[name], parameters=options[name]) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        client.pwrite(b"x" * 4096, 4096, nbd.CMD_FLAG_FUA)
        assert client.pread(4096, 4096) == b"x" * 4096
        assert client.pread(512, 0) == plugin.data[:512]
        client.flush()
        client.shutdown()


# -- clients that go, or do not read ---------------------------------------------------------------


def test_a_client_that_does_not_read_hurts_itself_alone(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as rude, client_of(server) as polite:
        rude.sock.settimeout(NOT_YET)
        try:
            while True:
                rude.send(rude.request(READ, 1, 0, 1 << 20))
        except TimeoutError:
            pass  # the server has stopped to read
        taken = plugin.calls.left
        assert taken <= (BUDGET >> 20) + 4  # what the socket has taken makes a little room
        for offset in range(0, 512 * 200, 512):
            read_ok(polite, offset, plugin)
        rude.sock.settimeout(WAIT)
        for _ in range(taken):  # and it may still change its mind
            assert rude.simple(1 << 20)[:2] == (1, 0)
        until(lambda: plugin.calls.left > taken + 200)


def test_many_small_replies_that_nobody_reads(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as rude, client_of(server) as polite:
        rude.sock.settimeout(NOT_YET)
        sent = 0
        try:
            while True:
                rude.send(rude.request(READ, 1, 0, 4096) * 100)
                sent += 100
        except TimeoutError:
            pass
        # At most so many wait in the server, beside what the socket has.
        buffered = rude.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert plugin.calls.left <= tasks.MOST + buffered // 4096 + 64
        read_ok(polite, 0, plugin)


def test_stop_cuts_off_a_client_that_does_not_read(
    plugin: Gated, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pynbdkit.server.server.STOP_PATIENCE", 0.2)
    with serving(plugin) as server:
        rude = client_of(server)
        for _ in range(8):
            rude.send(rude.request(READ, 1, 0, 1 << 20))
        until(lambda: plugin.calls.left == 8)
        until(lambda: all(each.sending for each in transmissions(server)))
    assert any("do not take their replies: cut off" in line for line in lines)
    assert plugin.events == ["close", "cleanup"]
    rude.close()


def test_a_client_that_goes_leaves_its_writes_to_end(plugin: Gated) -> None:
    """A coroutine is not cancelled in the middle; close waits for it."""
    with serving(plugin) as server:
        client = client_of(server)
        plugin.shut()
        for number in range(50):
            client.ask(WRITE, number, 512 * number, 512, payload=b"w" * 512)
        client.ask(READ, 99, 0, 4096)
        assert plugin.calls.reaches(51)
        client.close()
        threading.Event().wait(NOT_YET)
        assert plugin.calls.inside == 51
        assert plugin.events == []
        with client_of(server) as other:  # others go on
            other.ask(FLUSH, 1)
            assert other.simple() == (1, 0, b"")
        plugin.release()
        until(lambda: server.connections == 0)
        assert plugin.data[: 512 * 50] == b"w" * 512 * 50
        assert plugin.events == ["flush", "close", "close"] or plugin.events[0] == "flush"


def test_stop_waits_for_what_is_in_flight(plugin: Gated) -> None:
    with serving(plugin) as server:
        client = client_of(server)
        plugin.shut()
        for cookie in range(200):
            client.ask(READ, cookie, 0, 8)
        assert plugin.calls.reaches(200)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(NOT_YET)
        assert stopping.is_alive()
        assert plugin.events == []
        plugin.release()
        assert {client.simple(8)[0] for _ in range(200)} == set(range(200))
        stopping.join(WAIT)
        assert not stopping.is_alive()
        assert client.at_end()
        assert plugin.events == ["close", "cleanup"]
        plugin.release = lambda: None  # type: ignore[method-assign]


def test_disc_waits_for_what_is_in_flight(nbd: ModuleType, plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        plugin.shut()
        client.ask(WRITE, 1, 0, 512, payload=b"z" * 512)
        client.ask(2, 2)  # DISC
        assert plugin.calls.reaches(1)
        plugin.release()
        assert client.simple() == (1, 0, b"")
        assert client.at_end()
    assert plugin.data[:512] == b"z" * 512


def test_a_large_write_that_trickles_in(plugin: Gated) -> None:
    with serving(plugin) as server, client_of(server) as client:
        payload = random.Random(3).randbytes(3 << 20)
        message = client.request(WRITE, 1, 512, len(payload)) + payload
        chance = random.Random(4)
        position = 0
        while position < len(message):
            step = chance.choice([1, 27, 28, 4096, 100_000])
            client.send(message[position : position + step])
            position += step
        assert client.simple() == (1, 0, b"")
    assert plugin.data[512 : 512 + len(payload)] == payload


def test_an_idle_client_has_a_small_buffer(plugin: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "LONG_SILENCE", 0.05)
    with serving(plugin) as server, client_of(server) as client:
        client.send(b"".join(client.request(READ, n, 0, 8) for n in range(1000)))
        for _ in range(1000):
            client.simple(8)
        (transmission,) = transmissions(server)
        until(lambda: not transmission.receiver.parser.large)
        read_ok(client, 0, plugin)


# -- other ways to come in -------------------------------------------------------------------------


def test_over_tls(certificates: Certificates, nbd: ModuleType, plugin: Gated) -> None:
    with serving(plugin, tls="require", tls_certificates=certificates["good"]) as server:
        client = nbd.NBD()
        client.set_uri_allow_local_file(True)
        client.connect_uri(certificates.uri(server.uri))
        plugin.shut()
        buffers = [nbd.Buffer(4096) for _ in range(200)]
        cookies = [client.aio_pread(b, 4096 * n) for n, b in enumerate(buffers)]
        while plugin.calls.inside < 200:
            client.poll(10)
        plugin.release()
        for cookie in cookies:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
        for number, buffer in enumerate(buffers):
            assert buffer.to_bytearray() == plugin.data[4096 * number : 4096 * number + 4096]
        data = random.Random(5).randbytes(5 << 20)
        client.pwrite(data, 0)
        assert client.pread(5 << 20, 0) == data
        client.shutdown()
    assert plugin.events == ["close", "cleanup"]
