"""Who runs when: the four thread models, and calls that wait in layers that declare nothing.

What must happen at once is shown by calls that wait for each other; what must not, by counters that
many clients push against. Where a test has to see that something does not happen, it looks for a
moment (`NOT_YET`).
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import pynbdkit
from pynbdkit import Device, Filter, FilterDevice, Plugin, RunningServer, Session
from pynbdkit.complete import Layer
from pynbdkit.server import receiver, waiting
from pynbdkit.server import transmission as transmission_module
from pynbdkit.server import watch as watch_module
from pynbdkit.server.crew import Crew
from pynbdkit.server.transmission import Transmission
from pynbdkit.server.watch import Watch
from pynbdkit.session import current
from raw import DISC, FLUSH, READ, TRIM, WRITE, ZEROES, Raw

SIZE = 1 << 20
WAIT = 20.0
"""Seconds after which a test gives up: nothing that works takes that long."""
NOT_YET = 0.05
"""Seconds that a test looks for what must not happen."""
MODELS = range(4)
CONNECTIONS, ALL_REQUESTS, REQUESTS, PARALLEL = MODELS


class Counter:
    """How many are inside at once, and the most that there ever were."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self.inside = 0
        self.highest = 0
        self.entered = 0

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.entered += 1
            self.highest = max(self.highest, self.inside)
            self._lock.notify_all()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1
            self._lock.notify_all()

    def reaches(self, count: int, seconds: float = WAIT) -> bool:
        """Wait until so many are inside at once."""
        with self._lock:
            return self._lock.wait_for(lambda: self.inside >= count, seconds)


class Busy(Device):
    """Every call, also each question, is counted, and gives others an occasion to come in."""

    def __init__(self, plugin: BusyPlugin) -> None:
        self.plugin = plugin
        self.own = Counter()

    def _call(self, value: Any = None) -> Any:
        with self.plugin.calls, self.own:
            self.plugin.pause.wait(0.0005)
        return value

    def get_size(self) -> int:
        return self._call(SIZE)  # type: ignore[no-any-return]

    def block_size(self) -> tuple[int, int, int]:
        return self._call((1, 4096, 1 << 20))  # type: ignore[no-any-return]

    def export_description(self) -> str:
        return self._call("busy")  # type: ignore[no-any-return]

    def can_write(self) -> bool:
        return self._call(True)  # type: ignore[no-any-return]

    can_flush = can_trim = can_zero = can_multi_conn = can_extents = can_write

    def can_fua(self) -> int:
        return self._call(2)  # type: ignore[no-any-return]

    def can_cache(self) -> int:
        return self._call(2)  # type: ignore[no-any-return]

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        return self._call(bytes(count))  # type: ignore[no-any-return]

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self._call()

    def flush(self, flags: int) -> None:
        self._call()

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._call()

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._call()

    def cache(self, count: int, offset: int, flags: int) -> None:
        self._call()

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        return self._call([(offset, count, 0)])  # type: ignore[no-any-return]

    def close(self) -> None:
        self._call()


class BusyPlugin(Plugin):
    """Its devices count together (`calls`) and each for itself (`devices[n].own`)."""

    name = "busy"

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()
        self.pause = threading.Event()
        self.devices: list[Busy] = []

    def _call(self) -> None:
        with self.calls:
            self.pause.wait(0.0005)

    def preconnect(self, readonly: bool) -> None:
        self._call()

    def list_exports(self, readonly: bool, is_tls: bool) -> list[str]:
        self._call()
        return ["one", "two"]

    def default_export(self, readonly: bool, is_tls: bool) -> str:
        self._call()
        return "one"

    def open(self, session: Session) -> Device:
        self._call()
        self.devices.append(Busy(self))
        return self.devices[-1]


class StrictFilter(Filter):
    """Changes nothing; its thread model counts all the same."""

    name = "strict"

    def __init__(self, model: int) -> None:
        super().__init__()
        self.thread_model = model


def push(server: RunningServer, rounds: int = 12) -> None:
    """Connect, list, disconnect; connect, pipeline all kinds of requests, read the replies."""
    assert server.socket is not None
    with Raw(server.socket, go=False) as client:
        client.receive(18)
        client.send(b"\0\0\0\3")
        client.option(3)
        while client.reply()[1] != 1:
            pass
    with Raw(server.socket) as client:
        kinds = [READ, WRITE, TRIM, ZEROES, FLUSH]
        for number in range(rounds):
            kind = kinds[number % len(kinds)]
            count = 0 if kind == FLUSH else 512
            client.ask(kind, number, 0, count, 0, b"x" * 512 if kind == WRITE else b"")
        for _ in range(rounds):
            cookie, error, _ = client.simple()
            assert error == 0
            if kinds[cookie % len(kinds)] == READ:
                client.receive(512)


def in_threads(count: int, work: Callable[[], None]) -> None:
    """Run `work` in so many threads; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


# -- nothing more at once than the model allows ----------------------------------------------------


@pytest.mark.parametrize("blocking", [None, True])
@pytest.mark.parametrize("plugin_model", MODELS)
@pytest.mark.parametrize("filter_model", MODELS)
def test_the_strictest_layer_decides(
    plugin_model: int, filter_model: int, blocking: bool | None
) -> None:
    plugin = BusyPlugin()
    plugin.thread_model = plugin_model
    plugin.blocking = blocking
    filters = [StrictFilter(PARALLEL), StrictFilter(filter_model)]
    with pynbdkit.serve(plugin, filters=filters) as server:
        in_threads(3, lambda: push(server))
    model = min(plugin_model, filter_model)
    assert [filter.chain_thread_model for filter in filters] == [model, model]
    assert len(plugin.devices) == 3
    if model in (CONNECTIONS, ALL_REQUESTS):
        assert plugin.calls.highest == 1
    else:
        assert plugin.calls.highest > 1
    if model == PARALLEL and blocking:
        assert max(device.own.highest for device in plugin.devices) > 1
    if model <= REQUESTS:
        assert max(device.own.highest for device in plugin.devices) == 1


# -- devices whose calls wait for each other -------------------------------------------------------


class Meeting(Device):
    """pread calls what the test says; its thread is noted."""

    def __init__(self, on_read: Callable[[int], None]) -> None:
        self.on_read = on_read
        self.calls = Counter()
        self.threads: list[str] = []

    def get_size(self) -> int:
        return SIZE

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        self.threads.append(threading.current_thread().name)
        with self.calls:
            self.on_read(offset)
        return offset.to_bytes(8, "big") * (count // 8)

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        with self.calls:
            before = bytes(buf)
            self.on_read(offset)
            assert bytes(buf) == before


class Devices(Plugin):
    """Opens the same device for everybody."""

    name = "devices"

    def __init__(self, device: Device, model: int = PARALLEL, blocking: bool | None = None) -> None:
        super().__init__()
        self.device = device
        self.thread_model = model
        self.blocking = blocking

    def open(self, session: Session) -> Device:
        return self.device


@contextmanager
def serving(
    device: Device,
    release: threading.Event,
    model: int = PARALLEL,
    blocking: bool | None = None,
    threads: int = 16,
) -> Iterator[RunningServer]:
    """Serve a device; before the server is stopped (it waits for its calls), release is set."""
    with pynbdkit.serve(Devices(device, model, blocking), threads=threads) as server:
        try:
            yield server
        finally:
            release.set()


def client_of(server: RunningServer) -> Raw:
    assert server.socket is not None
    return Raw(server.socket)


def cookies(client: Raw, count: int) -> list[int]:
    """Whose replies come next, none of them an error."""
    result = []
    for _ in range(count):
        cookie, error, _ = client.simple(8)
        assert error == 0, cookie
        result.append(cookie)
    return result


def read_ok(client: Raw, offset: int = 0) -> None:
    client.ask(READ, offset, offset, 8)
    assert client.simple(8) == (offset, 0, offset.to_bytes(8, "big"))


@pytest.fixture
def release() -> threading.Event:
    """What calls wait for."""
    return threading.Event()


def until(event: threading.Event) -> None:
    assert event.wait(WAIT)


def test_serialize_requests_runs_connections_at_the_same_time() -> None:
    together = threading.Barrier(2)
    device = Meeting(lambda offset: (together.wait(WAIT), None)[1])
    with pynbdkit.serve(Devices(device, REQUESTS)) as server:
        in_threads(2, lambda: read_ok(client_of(server)))
    assert device.calls.highest == 2


def test_serialize_requests_runs_one_of_a_connection(release: threading.Event) -> None:
    device = Meeting(lambda offset: until(release))
    with serving(device, release, REQUESTS, True) as server, client_of(server) as client:
        for cookie in range(4):
            client.ask(READ, cookie, cookie, 8)
        assert device.calls.reaches(1)
        assert not device.calls.reaches(2, NOT_YET)
        release.set()
        assert cookies(client, 4) == [0, 1, 2, 3]


def test_serialize_all_requests_runs_one_of_all_connections(release: threading.Event) -> None:
    device = Meeting(lambda offset: until(release))
    with (
        serving(device, release, ALL_REQUESTS, True) as server,
        client_of(server) as first,
        client_of(server) as second,
    ):
        first.ask(READ, 1, 8, 8)
        assert device.calls.reaches(1)
        second.ask(READ, 2, 16, 8)
        assert not device.calls.reaches(2, NOT_YET)
        release.set()
        assert cookies(first, 1) == [1]
        assert cookies(second, 1) == [2]
    assert device.calls.highest == 1


def test_a_client_that_reads_no_replies_holds_up_nobody() -> None:
    """Under serialize_all_requests: nothing is sent while the others wait for their turn."""
    device = Meeting(lambda offset: None)
    with pynbdkit.serve(Devices(device, ALL_REQUESTS)) as server, client_of(server) as rude:
        rude.sock.settimeout(NOT_YET)
        try:
            while True:
                rude.send(rude.request(READ, 1, 0, SIZE))
        except TimeoutError:
            pass  # the server waits for us: it has stopped to read
        with client_of(server) as polite:
            for offset in range(100):
                read_ok(polite, offset)


def test_serialize_connections_lets_the_next_client_wait(release: threading.Event) -> None:
    events: list[str] = []

    class Plug(Devices):
        def preconnect(self, readonly: bool) -> None:
            events.append("preconnect")

        def open(self, session: Session) -> Device:
            events.append("open")
            return super().open(session)

    class Disk(Meeting):
        def close(self) -> None:
            events.append("close")

    with pynbdkit.serve(Plug(Disk(lambda offset: None), CONNECTIONS)) as server:
        first = client_of(server)
        assert server.socket is not None
        second = Raw(server.socket, go=False)
        second.sock.settimeout(NOT_YET)
        with pytest.raises(TimeoutError):
            second.receive(1)  # not even the greeting
        read_ok(first, 8)
        assert events == ["preconnect", "open"]
        first.close()
        second.sock.settimeout(WAIT)
        assert second.receive(8) == b"NBDMAGIC"
        assert events[:4] == ["preconnect", "open", "close", "preconnect"]
        second.close()
        with client_of(server) as third:
            read_ok(third)


def test_a_stop_while_a_client_waits_for_its_turn() -> None:
    with pynbdkit.serve(Devices(Meeting(lambda offset: None), CONNECTIONS)) as server:
        first = client_of(server)
        assert server.socket is not None
        with Raw(server.socket, go=False) as second:
            while server.connections < 2:
                threading.Event().wait(0.001)
            server.stop()
            assert first.at_end()
            assert second.at_end()
        first.close()


# -- parallel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 5])
def test_parallel_runs_as_many_as_there_are_threads(threads: int, release: threading.Event) -> None:
    device = Meeting(lambda offset: until(release))
    with serving(device, release, PARALLEL, True, threads) as server, client_of(server) as client:
        for cookie in range(3 * threads):
            client.ask(READ, cookie, cookie, 8)
        assert device.calls.reaches(threads)
        assert not device.calls.reaches(threads + 1, NOT_YET)
        release.set()
        assert set(cookies(client, 3 * threads)) == set(range(3 * threads))
    assert device.calls.highest == threads


def test_each_connection_has_its_own_threads(release: threading.Event) -> None:
    device = Meeting(lambda offset: until(release))
    with (
        serving(device, release, PARALLEL, True, 2) as server,
        client_of(server) as first,
        client_of(server) as second,
    ):
        for cookie in range(4):
            first.ask(READ, cookie, cookie, 8)
            second.ask(READ, cookie, cookie, 8)
        assert device.calls.reaches(4)
        assert not device.calls.reaches(5, NOT_YET)
        release.set()
        for client in (first, second):
            assert set(cookies(client, 4)) == set(range(4))


@pytest.mark.parametrize("blocking", [None, True])
def test_one_thread_is_one_request_at_a_time(
    blocking: bool | None, release: threading.Event
) -> None:
    device = Meeting(lambda offset: until(release))
    with serving(device, release, PARALLEL, blocking, 1) as server, client_of(server) as client:
        for cookie in range(4):
            client.ask(READ, cookie, cookie, 8)
        assert device.calls.reaches(1)
        assert not device.calls.reaches(2, NOT_YET)
        release.set()
        assert cookies(client, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("model", [CONNECTIONS, ALL_REQUESTS, REQUESTS])
def test_serialized_models_run_calls_where_they_were_read(model: int) -> None:
    device = Meeting(lambda offset: None)
    with pynbdkit.serve(Devices(device, model, True)) as server, client_of(server) as client:
        for offset in range(20):
            read_ok(client, offset)
    assert set(device.threads) == {"connection-1"}


def test_a_layer_that_may_wait_is_enough() -> None:
    """The plugin declares that it never waits, a filter that it does: calls go to threads."""
    together = threading.Barrier(3)

    class Waiting(Filter):
        name = "waiting"
        blocking = True

        def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
            class Wait(FilterDevice):
                def pread(self, count: int, offset: int, flags: int) -> Any:
                    together.wait(WAIT)
                    return self.next.pread(count, offset, flags)

            return Wait(next(session))

    device = Meeting(lambda offset: None)
    plugin = Devices(device, PARALLEL, False)
    with (
        pynbdkit.serve(plugin, filters=[Waiting()]) as server,
        client_of(server) as client,
    ):
        for cookie in range(3):
            client.ask(READ, cookie, cookie, 8)
        assert set(cookies(client, 3)) == {0, 1, 2}


# -- calls that wait, and nobody has said so -------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False], ids=["one batch", "later"])
@pytest.mark.parametrize("kind", [READ, WRITE])
def test_a_call_may_wait_for_a_later_request_of_its_client(
    kind: int, at_once: bool, release: threading.Event
) -> None:
    device = Meeting(lambda offset: release.set() if offset == 8 else until(release))
    with serving(device, release) as server, client_of(server) as client:
        for _ in range(3):
            read_ok(client, 8)  # nothing waits yet
            release.clear()
            payload = b"payload!" if kind == WRITE else b""
            first = client.request(kind, 1, 0, 8) + payload
            second = client.request(READ, 2, 8, 8)
            if at_once:
                client.send(first + second)
            else:
                client.send(first)
                assert device.calls.reaches(1)
                client.send(second)
            assert client.simple(8) == (2, 0, (8).to_bytes(8, "big"))
            assert client.simple(8 if kind == READ else 0)[:2] == (1, 0)


def test_a_call_may_wait_for_a_request_that_came_right_behind_its_large_payload(
    release: threading.Event,
) -> None:
    """It is received before the call begins, so there is nothing left to be seen on the socket."""
    device = Meeting(lambda offset: release.set() if offset == 8 else until(release))
    size = receiver.LARGE_PAYLOAD
    with serving(device, release) as server, client_of(server) as client:
        for _ in range(5):
            read_ok(client, 8)  # and nobody else: it is alone
        release.clear()
        first = client.request(WRITE, 1, 0, size) + bytes(size)
        client.send(first + client.request(READ, 2, 8, 8))
        assert client.simple(8) == (2, 0, (8).to_bytes(8, "big"))
        assert client.simple() == (1, 0, b"")


def test_a_slow_request_does_not_hold_up_quick_ones(release: threading.Event) -> None:
    device = Meeting(lambda offset: until(release) if offset == 0 else None)
    with serving(device, release) as server, client_of(server) as client:
        client.ask(READ, 0, 0, 8)
        assert device.calls.reaches(1)
        for offset in range(8, 408, 8):
            read_ok(client, offset)
        client.send(b"".join(client.request(READ, n, n, 8) for n in range(8, 808, 8)))
        assert set(cookies(client, 100)) == set(range(8, 808, 8))
        release.set()
        assert client.simple(8) == (0, 0, bytes(8))


@pytest.mark.parametrize("size", [4096, receiver.LARGE_PAYLOAD])
def test_the_payload_of_a_call_that_was_left_behind_stays_what_it_was(
    release: threading.Event, size: int
) -> None:
    """However much is received meanwhile: its buffer is its own."""
    seen = []

    class Disk(Meeting):
        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            if offset == 0:
                with self.calls:
                    until(release)
                seen.append(bytes(buf))

    device = Disk(lambda offset: None)
    with serving(device, release) as server, client_of(server) as client:
        client.ask(WRITE, 1, 0, size, payload=b"A" * size)
        assert device.calls.reaches(1)
        for cookie in range(2, 200):
            client.ask(WRITE, cookie, 8192, size, payload=b"B" * size)
            assert client.simple() == (cookie, 0, b"")
        release.set()
        assert client.simple() == (1, 0, b"")
    assert seen == [b"A" * size]


def test_no_more_than_the_threads_wait_at_once(release: threading.Event) -> None:
    """The call that was left behind counts as one of them; and more calls make no more threads."""
    device = Meeting(lambda offset: until(release))
    with serving(device, release, threads=3) as server, client_of(server) as client:
        client.ask(READ, 0, 0, 8)
        assert device.calls.reaches(1)
        for cookie in range(1, 50):
            client.ask(READ, cookie, cookie, 8)
        assert device.calls.reaches(3)
        assert not device.calls.reaches(4, NOT_YET)
        release.set()
        assert set(cookies(client, 50)) == set(range(50))
    assert device.calls.highest == 3


def test_a_call_that_waits_for_ever_makes_no_thread_for_each_of_its_kind(
    release: threading.Event,
) -> None:
    """Quick calls in between do not lead back to calls in the reader, to be left behind again."""
    device = Meeting(lambda offset: until(release) if offset == 0 else None)
    threads = 3
    before = threading.active_count()
    with serving(device, release, threads=threads) as server, client_of(server) as client:
        for number in range(threads - 1):
            client.ask(READ, 0, 0, 8)
            assert device.calls.reaches(number + 1)
            for _ in range(6):
                client.send(b"".join(client.request(READ, n, n, 8) for n in range(8, 808, 8)))
                assert set(cookies(client, 100)) == set(range(8, 808, 8))
        # accept, watch, the connection's own, and its workers
        assert threading.active_count() - before <= 3 + threads
        release.set()
        assert cookies(client, threads - 1) == [0] * (threads - 1)


def test_waiting_calls_are_dispatched_and_quick_ones_run_where_they_are_read() -> None:
    quick, nothing = threading.Event(), threading.Event()
    device = Meeting(lambda offset: None if quick.is_set() else (nothing.wait(0.001), None)[1])

    def ask_until(dispatching: bool) -> list[str]:
        """Send batches until calls run as they should; where those of one more batch ran."""
        (connection,) = server._server._connections
        transmission = connection._transmission
        assert transmission is not None
        for _ in range(300):
            done = transmission._dispatching == dispatching
            client.send(b"".join(client.request(READ, n, n, 8) for n in range(30)))
            assert set(cookies(client, 30)) == set(range(30))
            if done and transmission._dispatching == dispatching:
                return device.threads[-30:]
        raise AssertionError(f"300 batches, and {dispatching=} was not seen")

    with pynbdkit.serve(Devices(device)) as server, client_of(server) as client:
        read_ok(client)
        assert device.threads == ["connection-1"]
        for _ in range(2):
            quick.clear()
            assert len(set(ask_until(dispatching=True))) > 1
            quick.set()
            assert len(set(ask_until(dispatching=False))) == 1


def test_a_long_first_batch_of_calls_that_wait_is_not_run_one_by_one() -> None:
    nothing = threading.Event()
    device = Meeting(lambda offset: (nothing.wait(0.002), None)[1])
    with pynbdkit.serve(Devices(device)) as server, client_of(server) as client:
        client.send(b"".join(client.request(READ, n, n, 8) for n in range(200)))
        assert set(cookies(client, 200)) == set(range(200))
    assert device.threads.count("connection-1") < 100
    assert len(set(device.threads)) > 2


@pytest.mark.parametrize("waits", [True, False])
def test_a_long_batch_is_judged_by_what_it_cost_since_the_last_look(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = types.SimpleNamespace(progress=(7, 200), _reader=1, _noted=(0, 0, 0, 0, 0, 0))
    now, cost = 100.0, (3.0, 50, 50.0)
    asked: list[Any] = []
    monkeypatch.setattr(transmission_module, "perf_counter", lambda: now)
    monkeypatch.setattr(waiting, "usage_of", lambda thread: cost)

    def judge(*what: float) -> bool:
        asked.append(what)
        return waits

    monkeypatch.setattr(waiting, "wait", judge)

    def look() -> bool:
        return Transmission.waits(reader)  # type: ignore[arg-type]

    assert not look()  # the first time there is nothing to compare with
    assert not asked
    now, cost, reader.progress = now + 4, (3.25, 55, 52.0), (7, 193)
    assert look() == waits
    assert asked == [(7, 4.0, 0.25, 5, 2.0)]
    now, cost, reader.progress = now + 4, (4.0, 100, 54.0), (8, 1)
    assert not look()  # another batch


def test_calls_that_wait_stay_in_the_reader_while_the_process_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks as if they waited for the interpreter: threads would be in each other's way."""
    monkeypatch.setattr(waiting, "BUSY", 0.0)
    monkeypatch.setattr(waiting, "BY_FAR", 1e9)
    monkeypatch.setattr(watch_module, "TICK", WAIT)
    nothing = threading.Event()
    device = Meeting(lambda offset: (nothing.wait(0.001), None)[1])
    with pynbdkit.serve(Devices(device)) as server, client_of(server) as client:
        for _ in range(10):
            client.send(b"".join(client.request(READ, n, n, 8) for n in range(10)))
            assert cookies(client, 10) == list(range(10))
    assert set(device.threads) == {"connection-1"}


def test_calls_that_wait_for_long_run_in_threads_however_busy_the_process_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that computes all the time must not keep another one's from waiting at once."""
    monkeypatch.setattr(waiting, "BUSY", 0.0)
    monkeypatch.setattr(watch_module, "TICK", WAIT)
    nothing = threading.Event()
    device = Meeting(lambda offset: (nothing.wait(0.004), None)[1])
    with pynbdkit.serve(Devices(device)) as server, client_of(server) as client:
        for _ in range(100):
            client.send(b"".join(client.request(READ, n, n, 8) for n in range(10)))
            assert set(cookies(client, 10)) == set(range(10))
            if len(set(device.threads)) > 1:
                break
        else:
            raise AssertionError("100 batches, all in the reader")


def test_many_changes_leave_no_threads_behind() -> None:
    """Slow and quick calls in turn: the connection's threads do not add up."""
    nothing = threading.Event()
    device = Meeting(lambda offset: (nothing.wait(0.012), None)[1] if offset == 0 else None)
    before = threading.active_count()
    with pynbdkit.serve(Devices(device), threads=2) as server, client_of(server) as client:
        quick = b"".join(client.request(READ, n, n, 8) for n in range(8, 8 * 400, 8))
        for _ in range(15):
            client.send(client.request(READ, 0, 0, 8) + client.request(READ, 8, 8, 8))
            assert set(cookies(client, 2)) == {0, 8}
            client.send(quick)
            for _ in range(8, 8 * 400, 8):
                client.simple(8)
        assert threading.active_count() - before <= 3 + 2 + 1
        (connection,) = server._server._connections
        assert connection._transmission is not None
        crew = connection._transmission._crew
        assert isinstance(crew, Crew)
        assert len(crew._threads) <= 2 * 2 + 1  # nor what is left of them
    assert threading.active_count() <= before


def test_calls_left_behind_make_room_again(release: threading.Event) -> None:
    """First all workers are there, then the reader is left behind: one of them makes room."""
    together = threading.Barrier(2)

    def on_read(offset: int) -> None:
        if offset == 0:
            together.wait(WAIT)
        elif offset == 16:
            until(release)

    device = Meeting(on_read)
    quick = b"".join(Raw.request(READ, 8, 8, 8) for _ in range(400))
    with serving(device, release, threads=2) as server, client_of(server) as client:
        (connection,) = server._server._connections
        for _ in range(2):
            for _ in range(3):  # two at once, each time, also in threads
                client.ask(READ, 0, 0, 8)
                client.ask(READ, 0, 0, 8)
                assert cookies(client, 2) == [0, 0]
            transmission = connection._transmission
            assert transmission is not None
            while transmission._dispatching:
                client.send(quick)
                for _ in range(400):
                    client.simple(8)
            device.calls.highest = 0
            for cookie in range(100, 110):
                client.ask(READ, cookie, 16, 8)
            assert device.calls.reaches(2)
            assert not device.calls.reaches(3, NOT_YET)
            release.set()
            assert set(cookies(client, 10)) == set(range(100, 110))
            release.clear()
            assert device.calls.highest == 2


def run_quick(server: RunningServer, client: Raw) -> None:
    """Send quick requests until they run where they are read."""
    (connection,) = server._server._connections
    transmission = connection._transmission
    assert transmission is not None
    for _ in range(300):
        client.send(b"".join(client.request(READ, 8, 8, 8) for _ in range(100)))
        for _ in range(100):
            client.simple(8)
        if not transmission._dispatching:
            return
    raise AssertionError("calls are dispatched for ever")


def test_a_call_that_comes_back_does_not_hide_another_that_waits(
    release: threading.Event,
) -> None:
    late, last = threading.Event(), threading.Event()

    def on_read(offset: int) -> None:
        if offset in (0, 16):
            until(late if offset == 0 else last)
        elif offset == 24:
            last.set()

    device = Meeting(on_read)
    with serving(device, release) as server, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        assert device.calls.reaches(1)
        run_quick(server, client)  # the first reader is left behind, the next runs calls
        client.ask(READ, 2, 16, 8)
        assert device.calls.reaches(2)
        late.set()
        assert cookies(client, 1) == [1]
        client.ask(READ, 3, 24, 8)
        assert set(cookies(client, 2)) == {2, 3}


def test_what_waited_for_room_runs_when_there_is_some(release: threading.Event) -> None:
    """All threads were left behind, none is a worker, and no other request comes."""
    first = threading.Event()
    waiting = {0: first, 16: release}
    device = Meeting(lambda offset: until(waiting[offset]) if offset in waiting else None)
    with serving(device, release, threads=2) as server, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        assert device.calls.reaches(1)
        run_quick(server, client)
        client.send(client.request(READ, 2, 16, 8) + client.request(READ, 3, 8, 8))
        assert device.calls.reaches(2)
        threading.Event().wait(NOT_YET)  # the second is left behind; the third waits for room
        first.set()
        assert set(cookies(client, 2)) == {1, 3}
        release.set()
        assert cookies(client, 1) == [2]


def test_every_thread_knows_its_session(release: threading.Event) -> None:
    sessions = []
    both = threading.Barrier(2)

    def on_read(offset: int) -> None:
        sessions.append((current(), threading.current_thread().name))
        both.wait(WAIT)

    with pynbdkit.serve(Devices(Meeting(on_read))) as server, client_of(server) as client:
        for _ in range(3):
            client.send(client.request(READ, 1, 0, 8) + client.request(READ, 2, 8, 8))
            assert set(cookies(client, 2)) == {1, 2}
    assert len({id(session) for session, _ in sessions}) == 1
    assert sessions[0][0] is not None
    assert len({name for _, name in sessions}) > 1


def test_the_end_of_a_client_is_seen_while_its_call_waits(release: threading.Event) -> None:
    """The device is closed once, and not before the call has ended."""
    events = []

    class Disk(Meeting):
        def close(self) -> None:
            events.append(("close", self.calls.inside))

    device = Disk(lambda offset: until(release))
    with serving(device, release) as server:
        for goodbye in (b"", Raw.request(DISC, 9)):
            client = client_of(server)
            client.ask(READ, 1, 0, 8)
            assert device.calls.reaches(1)
            client.send(goodbye)
            client.close()
            threading.Event().wait(NOT_YET)
            assert events == []
            release.set()
            while server.connections:
                threading.Event().wait(0.001)
            assert events == [("close", 0)]
            events.clear()
            release.clear()
        release.set()


# -- the watch by itself ---------------------------------------------------------------------------


class Reader:
    """What the watch sees of a transmission."""

    def __init__(self) -> None:
        self.busy = False
        self.watched = False
        self.progress = (0, 0)
        self.taken = threading.Event()

    def take_over(self) -> None:
        self.busy = False
        self.taken.set()

    def waits(self) -> bool:
        return False


def until_not_watched(*readers: Reader) -> None:
    for _ in range(2000):
        if not any(reader.watched for reader in readers):
            return
        threading.Event().wait(0.005)
    raise AssertionError("the watch goes on looking")


def test_the_watch_takes_over_from_who_makes_no_progress() -> None:
    watch = Watch()
    reader = Reader()
    for number in range(3):
        reader.progress = (number, 0)
        reader.busy = True
        if not reader.watched:
            watch.look_at(reader)  # type: ignore[arg-type]
        assert reader.taken.wait(WAIT)
        reader.taken.clear()
        if number == 1:
            until_not_watched(reader)
    watch.close()


def test_the_watch_looks_only_at_who_was_busy_and_can_be_closed_then() -> None:
    watch = Watch()
    readers = [Reader(), Reader()]
    for reader in readers:
        watch.look_at(reader)  # type: ignore[arg-type]
    readers[0].busy = True
    until_not_watched(readers[1])
    assert readers[0].taken.wait(WAIT)
    until_not_watched(readers[0])
    watch.close()


def test_a_reader_that_begins_while_the_watch_turns_away_is_looked_at() -> None:
    """It is busy before it asks whether it is watched; the watch asks in the opposite order."""

    class Late(Reader):
        @property
        def watched(self) -> bool:
            return self._watched

        @watched.setter
        def watched(self, value: bool) -> None:
            self._watched = value
            if not value and hasattr(self, "progress"):
                self.busy = True  # it saw True just before

    watch = Watch()
    reader = Late()
    watch.look_at(reader)  # type: ignore[arg-type]
    assert reader.taken.wait(WAIT)
    watch.close()


def test_the_watch_does_not_sleep_through_its_end() -> None:
    watch = Watch()
    reader = Reader()
    watch.look_at(reader)  # type: ignore[arg-type]
    watch.remove(reader)  # type: ignore[arg-type]
    watch.close()  # while it is about to sleep, or just asleep
    assert watch._thread is not None
    assert not watch._thread.is_alive()


def test_a_reader_is_busy_before_it_asks_whether_it_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the watch could turn away in between, and a call that waits would not be noticed."""
    asked: list[bool] = []

    class Asked(Watch):
        def look_at(self, transmission: Any) -> None:
            asked.append(transmission.busy)
            super().look_at(transmission)

    monkeypatch.setattr("pynbdkit.server.server.Watch", Asked)
    device = Meeting(lambda offset: None)
    with pynbdkit.serve(Devices(device)) as server, client_of(server) as client:
        read_ok(client)
    assert asked == [True]
