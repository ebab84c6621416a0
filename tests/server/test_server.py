"""A server's and a connection's life: refusals, sleeping, and above all the end."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
from pynbdkit import Device, Filter, FilterDevice, OpenError, Plugin, RunningServer, Session
from pynbdkit.chain import Chain
from pynbdkit.complete import Layer
from pynbdkit.flags import ThreadModel
from pynbdkit.server import server as server_module
from pynbdkit.server.listen import QUIET, listen_unix
from pynbdkit.server.server import Server
from raw import DISC, FLUSH, READ, WRITE, Raw

SIZE = 1 << 20
WAIT = 20.0
NOT_YET = 0.05
ACK, REP_INFO = 1, 3
UNKNOWN, POLICY = 2**31 + 6, 2**31 + 2
ESHUTDOWN = 108


def until(event: threading.Event) -> None:
    assert event.wait(WAIT)


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.001)
    return True


class Recorder(Plugin):
    """Notes its whole life in `events`; `on_call` is run in every read, write and flush."""

    name = "recorder"

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.events: list[str] = []
        self.on_call: Callable[[Session, int], None] = lambda session, offset: None
        self.on_open: Callable[[Session], None] = lambda session: None
        self.inside = 0
        for name, value in settings.items():
            setattr(self, name, value)

    def load(self) -> None:
        self.events.append("load")

    def get_ready(self) -> None:
        self.events.append("get_ready")

    def after_fork(self) -> None:
        self.events.append("after_fork")

    def preconnect(self, readonly: bool) -> None:
        self.events.append("preconnect")

    def open(self, session: Session) -> Device:
        self.events.append(f"open {session.export_name}")
        self.on_open(session)
        return RecorderDevice(self, session)

    def cleanup(self) -> None:
        self.events.append("cleanup")

    def unload(self) -> None:
        self.events.append("unload")


class RecorderDevice(Device):
    def __init__(self, plugin: Recorder, session: Session) -> None:
        self.plugin = plugin
        self.session = session
        self.lock = threading.Lock()

    def get_size(self) -> int:
        return SIZE

    def _call(self, offset: int) -> None:
        with self.lock:
            self.plugin.inside += 1
        try:
            self.plugin.on_call(self.session, offset)
        finally:
            with self.lock:
                self.plugin.inside -= 1

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        self._call(offset)
        return b"r" * count

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self._call(offset)

    def flush(self, flags: int) -> None:
        self._call(0)

    def close(self) -> None:
        self.plugin.events.append(f"close {self.session.export_name} {self.plugin.inside}")


@contextmanager
def serving(plugin: Plugin, *releases: threading.Event, **options: Any) -> Iterator[RunningServer]:
    """Serve; at the end what calls wait for is set first, because a stop waits for them."""
    with pynbdkit.serve(plugin, **options) as server:
        try:
            yield server
        finally:
            for event in releases:
                event.set()


def client_of(server: RunningServer, **options: Any) -> Raw:
    assert server.socket is not None
    return Raw(server.socket, **options)


def option_answer(client: Raw, export: str, option: int = 7) -> tuple[int, bytes]:
    """GO or INFO of an export: the last reply's type and data."""
    name = export.encode()
    client.option(option, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
    while True:
        _, kind, data = client.reply()
        if kind != REP_INFO:
            return kind, data


def greeted(server: RunningServer) -> Raw:
    client = client_of(server, go=False)
    client.receive(18)
    client.send(struct.pack(">I", 3))
    return client


# -- stop: what runs is finished -------------------------------------------------------------------


@pytest.mark.parametrize("model", [0, 1, 2, 3])
@pytest.mark.parametrize("blocking", [False, None, True])
def test_what_runs_is_finished_and_answered_before_the_end(
    blocking: bool | None, model: int
) -> None:
    inside, release = threading.Event(), threading.Event()

    def on_call(session: Session, offset: int) -> None:
        inside.set()
        until(release)

    plugin = Recorder(blocking=blocking, thread_model=model, on_call=on_call)
    with serving(plugin, release) as server, client_of(server) as client:
        client.ask(WRITE, 1, 0, 8, payload=b"x" * 8)
        until(inside)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        stopper.join(NOT_YET)
        assert stopper.is_alive()
        assert plugin.events[-1] == "open "
        release.set()
        assert client.simple() == (1, 0, b"")
        assert client.at_end()
        stopper.join(WAIT)
        assert not stopper.is_alive()
        assert plugin.events[3:] == ["preconnect", "open ", "close  0", "cleanup", "unload"]
    assert plugin.events[5:] == ["close  0", "cleanup", "unload"]


@pytest.mark.parametrize("blocking", [False, None, True])
def test_every_request_that_was_read_is_answered(blocking: bool | None) -> None:
    """Of the one batch that the server has taken, none is lost."""
    inside, release = threading.Event(), threading.Event()

    def on_call(session: Session, offset: int) -> None:
        if offset == 0:
            inside.set()
            until(release)

    plugin = Recorder(blocking=blocking, on_call=on_call)
    with serving(plugin, release) as server, client_of(server) as client:
        client.send(b"".join(client.request(READ, n, n, 8) for n in range(100)))
        until(inside)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        stopper.join(NOT_YET)
        release.set()
        assert {client.simple(8)[0] for _ in range(100)} == set(range(100))
        assert client.at_end()
        stopper.join(WAIT)


def test_a_call_that_takes_longer_than_clients_get_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "STOP_PATIENCE", 0.02)
    inside, release = threading.Event(), threading.Event()

    def on_call(session: Session, offset: int) -> None:
        inside.set()
        until(release)

    for blocking in (False, None, True):
        plugin = Recorder(blocking=blocking, on_call=on_call)
        with serving(plugin, release) as server, client_of(server) as client:
            client.ask(FLUSH, 1)
            until(inside)
            stopper = threading.Thread(target=server.stop)
            stopper.start()
            stopper.join(0.3)
            assert stopper.is_alive()
            assert "cleanup" not in plugin.events
            release.set()
            assert client.simple() == (1, 0, b"")
            stopper.join(WAIT)
        inside.clear()
        release.clear()


def test_idle_clients_and_those_in_the_handshake_are_let_go() -> None:
    plugin = Recorder()
    with serving(plugin) as server:
        clients = [client_of(server), client_of(server, go=False), greeted(server)]
        half = greeted(server)
        half.send(b"IHAVEOPT\0\0\0\7\0\0\0\x10\0\0")
        asked = greeted(server)
        assert option_answer(asked, "", option=6)[0] == ACK
        assert becomes(lambda: server.connections == 5)
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 5
        for client in (*clients, half, asked):
            while not client.at_end():
                pass
            client.close()
        assert server.connections == 0
    assert sorted(plugin.events[-4:-2]) == ["close  0", "close  0"]
    assert plugin.events[-2:] == ["cleanup", "unload"]


@pytest.mark.parametrize("blocking", [False, None, True])
def test_a_client_that_reads_no_replies_is_cut_off(
    blocking: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_module, "STOP_PATIENCE", 0.1)
    plugin = Recorder(blocking=blocking)
    with serving(plugin) as server:
        client = client_of(server)
        client.sock.settimeout(NOT_YET)
        try:
            while True:
                client.send(client.request(READ, 1, 0, SIZE))
        except TimeoutError:
            pass  # the server waits for us
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 5
        client.close()
    assert plugin.events[-3:] == ["close  0", "cleanup", "unload"]
    text = capsys.readouterr().err
    assert "1 client(s) do not take their replies: cut off" in text
    assert "Traceback" not in text


def test_a_client_that_reads_slowly_gets_all_its_replies() -> None:
    """Also those that wait when the server is asked to stop."""
    called = threading.Semaphore(0)
    plugin = Recorder(blocking=False, on_call=lambda session, offset: called.release())
    with serving(plugin) as server, client_of(server) as client:
        client.send(b"".join(client.request(READ, n, 0, SIZE) for n in range(4)))
        called.acquire()
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        stopper.join(NOT_YET)
        for cookie in range(4):
            assert client.simple(SIZE) == (cookie, 0, b"r" * SIZE)
        assert client.at_end()
        stopper.join(WAIT)


@pytest.mark.parametrize("when", ["in open", "in requests"])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_client_that_never_pauses_does_not_keep_the_server_from_its_end(
    tcp: bool, when: str
) -> None:
    """Over TCP, what comes after the reading side was shut down can still be read."""
    opening, release, stopped = threading.Event(), threading.Event(), threading.Event()

    def on_open(session: Session) -> None:
        opening.set()
        if when == "in open":
            until(release)

    def talk(client: Raw) -> None:
        block = client.request(READ, 1, 0, 8) * 64
        try:
            while not stopped.is_set():
                client.send(block)
        except OSError:
            pass

    def listen(client: Raw) -> None:
        try:
            while client.sock.recv(1 << 20):
                pass
        except OSError:
            pass

    options: dict[str, Any] = {"tcp": ("127.0.0.1", 0)} if tcp else {}
    nothing = threading.Event()  # calls are slow enough for requests to queue up
    plugin = Recorder(on_open=on_open, blocking=False)
    plugin.on_call = lambda session, offset: (nothing.wait(0.0001), None)[1]
    with serving(plugin, release, stopped, **options) as server:
        client = over_tcp(server, go=False) if tcp else client_of(server, go=False)
        client.receive(18)
        client.send(struct.pack(">IQIIIH", 3, 0x49484156454F5054, 7, 6, 0, 0))
        threads = [threading.Thread(target=work, args=(client,)) for work in (talk, listen)]
        for thread in threads:
            thread.start()
        until(opening)
        threading.Event().wait(NOT_YET)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        stopper.join(NOT_YET)
        release.set()
        stopper.join(5)
        assert not stopper.is_alive()
        stopped.set()
        for thread in threads:
            thread.join(WAIT)
        client.close()


def test_a_server_may_be_stopped_twice_and_by_many() -> None:
    plugin = Recorder()
    with serving(plugin) as server, client_of(server):
        threads = [threading.Thread(target=server.stop) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        server.stop()
    assert plugin.events.count("cleanup") == plugin.events.count("unload") == 1


def test_layers_are_closed_and_cleaned_up_in_order_whatever_they_raise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events: list[str] = []

    class Layered(Filter):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def _event(self, what: str) -> None:
            events.append(f"{self.name} {what}")
            raise RuntimeError(f"{self.name} {what}")

        def cleanup(self) -> None:
            self._event("cleanup")

        def unload(self) -> None:
            self._event("unload")

        def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
            event = self._event

            class Closing(FilterDevice):
                def close(self) -> None:
                    event("close")

            return Closing(next(session))

    plugin = Recorder(events=events)
    with (
        pynbdkit.serve(plugin, filters=[Layered("outer"), Layered("inner")]) as server,
        client_of(server) as client,
    ):
        client.ask(DISC)
    assert events[5:] == [
        "outer close", "inner close", "close  0",
        "outer cleanup", "inner cleanup", "cleanup",
        "unload", "inner unload", "outer unload",
    ]  # fmt: skip
    text = capsys.readouterr().err
    for event in ("inner close", "outer cleanup", "inner cleanup", "outer unload", "inner unload"):
        assert event in text


def test_no_thread_and_no_descriptor_is_left() -> None:
    def once(blocking: bool | None) -> None:
        nothing = threading.Event()
        plugin = Recorder(
            blocking=blocking, on_call=lambda session, offset: (nothing.wait(0.001), None)[1]
        )
        with serving(plugin) as server:
            clients = [client_of(server), greeted(server), client_of(server, go=False)]
            clients[0].send(b"".join(Raw.request(READ, n, n, 8) for n in range(40)))
            for _ in range(40):
                clients[0].simple(8)
        for client in clients:
            client.close()

    once(None)  # imports
    threads = set(threading.enumerate())
    files = len(os.listdir("/proc/self/fd"))
    for blocking in (False, None, True):
        once(blocking)
        assert set(threading.enumerate()) <= threads
        assert len(os.listdir("/proc/self/fd")) == files


def test_several_servers_live_side_by_side() -> None:
    plugins = [Recorder() for _ in range(4)]
    servers = [pynbdkit.serve(plugin) for plugin in plugins]
    assert len({server.uri for server in servers}) == 4
    clients = [client_of(server) for server in servers]
    servers.pop(1).stop()
    assert clients.pop(1).at_end()
    assert plugins.pop(1).events[-1] == "unload"
    for client in clients:
        client.ask(READ, 1, 0, 8)
        assert client.simple(8) == (1, 0, b"r" * 8)
    for server, client in zip(servers, clients, strict=True):
        client.close()
        server.stop()
    assert all(plugin.events[-1] == "unload" for plugin in plugins)


# -- stop and disconnect from within ---------------------------------------------------------------


@pytest.mark.parametrize("blocking", [False, None, True])
def test_a_plugin_may_stop_its_server(blocking: bool | None) -> None:
    plugin = Recorder(blocking=blocking, on_call=lambda session, offset: session.shutdown())
    with serving(plugin) as server, client_of(server) as other, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        assert client.simple(8) == (1, 0, b"r" * 8)
        assert client.at_end()
        assert other.at_end()
        assert becomes(lambda: plugin.events[-1] == "unload")  # nobody has to call stop
        with pytest.raises(OSError, match=r"refused|No such file"):
            client_of(server)


@pytest.mark.parametrize("blocking", [False, None, True])
def test_disconnect_sends_the_replies_that_are_due(blocking: bool | None) -> None:
    def on_call(session: Session, offset: int) -> None:
        if offset == 50:
            session.disconnect()

    plugin = Recorder(blocking=blocking, on_call=on_call)
    with serving(plugin) as server, client_of(server) as other, client_of(server) as client:
        client.send(b"".join(client.request(READ, n, n, 8) for n in range(100)))
        assert {client.simple(8)[0] for _ in range(100)} == set(range(100))
        assert client.at_end()
        other.ask(READ, 1, 0, 8)
        assert other.simple(8)[:2] == (1, 0)
        assert becomes(lambda: server.connections == 1)
        assert plugin.events.count("close  0") == 1


@pytest.mark.parametrize("blocking", [False, None, True])
def test_disconnect_by_force_sends_nothing_more(blocking: bool | None) -> None:
    plugin = Recorder(blocking=blocking, on_call=lambda session, _: session.disconnect(True))
    with serving(plugin) as server, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        assert client.at_end()
        assert becomes(lambda: server.connections == 0)
        assert plugin.events[-1] == "close  0"
        with client_of(server) as other:
            assert other.size == SIZE


# -- sleeping --------------------------------------------------------------------------------------


def _sleeper(seconds: float) -> tuple[Recorder, threading.Event, list[Any]]:
    """A plugin whose calls sleep; an event when one does; what came of each."""
    asleep = threading.Event()
    ends: list[Any] = []

    def on_call(session: Session, offset: int) -> None:
        asleep.set()
        try:
            session.sleep(seconds)
        except OSError as error:
            ends.append(error.errno)
            raise
        ends.append("slept")

    return Recorder(on_call=on_call), asleep, ends


def test_a_sleep_lasts_as_long_as_it_should() -> None:
    plugin, _, ends = _sleeper(0.3)
    with serving(plugin) as server, client_of(server) as client:
        begun = time.monotonic()
        client.ask(READ, 1, 0, 8)
        assert client.simple(8)[:2] == (1, 0)
        assert time.monotonic() - begun >= 0.3
    assert ends == ["slept"]


def test_a_sleep_ends_early_when_the_server_stops() -> None:
    plugin, asleep, ends = _sleeper(1000)
    with serving(plugin) as server, client_of(server) as client:
        client.ask(READ, 1, 0, 8)
        until(asleep)
        server.stop()
        assert client.simple() == (1, ESHUTDOWN, b"")
        assert client.at_end()
    assert ends == [errno.ESHUTDOWN]


@pytest.mark.parametrize("tcp", [False, True])
def test_a_sleep_ends_early_when_the_client_has_gone(tcp: bool) -> None:
    plugin, asleep, ends = _sleeper(1000)
    options: dict[str, Any] = {"tcp": ("127.0.0.1", 0)} if tcp else {}
    with serving(plugin, **options) as server:
        client = over_tcp(server) if tcp else client_of(server)
        client.ask(READ, 1, 0, 8)
        until(asleep)
        client.close()
        assert becomes(lambda: ends == [errno.ESHUTDOWN])
        assert becomes(lambda: plugin.events[-1] == "close  0")


def over_tcp(server: RunningServer, go: bool = True) -> Raw:
    """A client of a server on TCP."""
    client = Raw.__new__(Raw)
    client.sock = socket.create_connection(("127.0.0.1", server.port))
    client.sock.settimeout(WAIT)
    client.extended = False
    if go:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        assert option_answer(client, "")[0] == ACK
    return client


def test_others_are_served_while_one_sleeps() -> None:
    plugin, asleep, _ = _sleeper(1000)
    with serving(plugin) as server, client_of(server) as first:
        first.ask(READ, 1, 0, 8)
        until(asleep)
        plugin.on_call = lambda session, offset: None
        with client_of(server) as other:
            other.ask(READ, 2, 0, 8)
            assert other.simple(8)[:2] == (2, 0)


# -- clients that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EPERM, "not today"), ValueError("not today"), SystemExit("not today")],
    ids=lambda failure: type(failure).__name__,
)
def test_preconnect_refuses_a_client_without_a_word(
    failure: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse = [failure]

    class Picky(Recorder):
        def preconnect(self, readonly: bool) -> None:
            super().preconnect(readonly)
            if refuse:
                raise refuse.pop()

    plugin = Picky()
    with serving(plugin) as server:
        with client_of(server, go=False) as client:
            assert client.at_end()
        with client_of(server) as client:
            assert client.size == SIZE
    assert plugin.events[3:-2] == ["preconnect", "preconnect", "open ", "close  0"]
    assert "preconnect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (OSError(errno.ENOENT, "no such disk"), UNKNOWN, "no such disk"),
        (PermissionError(errno.EACCES, "not for you"), POLICY, "not for you"),
        (OpenError("FUA is offered on hope"), UNKNOWN, "FUA is offered on hope"),
        (ValueError("the password is secret"), UNKNOWN, "cannot be opened"),
        (SystemExit(1), UNKNOWN, "cannot be opened"),
        (MemoryError(), UNKNOWN, "cannot be opened"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failing_open_is_told_and_the_client_may_ask_for_another(
    failure: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_open(session: Session) -> None:
        if session.export_name == "bad":
            raise failure

    plugin = Recorder(on_open=on_open)
    with serving(plugin) as server:
        with greeted(server) as client:
            for option in (6, 7):
                kind, data = option_answer(client, "bad", option)
                assert kind == code
                assert words in data.decode()
            assert option_answer(client, "good")[0] == ACK
            client.ask(READ, 1, 0, 8)
            assert client.simple(8) == (1, 0, b"r" * 8)
        assert becomes(lambda: server.connections == 0)
        with greeted(server) as client:  # the oldest way: no error can be told
            client.option(1, b"bad")
            assert client.at_end()
        assert becomes(lambda: server.connections == 0)
    assert plugin.events[3:-2] == [
        "preconnect", "open bad", "open bad", "open good", "close good 0",
        "preconnect", "open bad",
    ]  # fmt: skip
    assert capsys.readouterr().err.count("error: open 'bad'") == 3


@pytest.mark.parametrize("question", ["get_size", "can_write", "can_extents", "block_size"])
def test_a_device_that_cannot_answer_is_closed_and_not_served(
    question: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [True]

    def fail(self: Device) -> Any:
        if broken:
            raise OSError(errno.EIO, "no answer")
        return {"get_size": SIZE, "block_size": (0, 0, 0)}.get(question, False)

    class Failing(RecorderDevice):
        pass

    setattr(Failing, question, fail)

    class Plug(Recorder):
        def open(self, session: Session) -> Device:
            super().open(session)
            return Failing(self, session)

    plugin = Plug()
    with serving(plugin) as server, greeted(server) as client:
        assert option_answer(client, "") == (UNKNOWN, b"no answer")
        assert plugin.events[4:] == ["open ", "close  0"]
        broken.clear()
        assert option_answer(client, "")[0] == ACK
    assert "no answer" in capsys.readouterr().err


def test_an_export_is_opened_once_for_info_and_go_and_closed_for_another() -> None:
    plugin = Recorder()
    with serving(plugin) as server, greeted(server) as client:
        for name, option in (("a", 6), ("a", 6), ("b", 6), ("b", 7)):
            assert option_answer(client, name, option)[0] == ACK
        client.ask(READ, 1, 0, 8)
        assert client.simple(8)[:2] == (1, 0)
        client.ask(DISC)
        assert client.at_end()
        assert becomes(lambda: server.connections == 0)
    assert plugin.events[4:-2] == ["open a", "close a 0", "open b", "close b 0"]


def test_requests_that_come_with_the_end_of_the_handshake() -> None:
    with serving(Recorder()) as server, client_of(server, go=False) as client:
        client.receive(18)
        go = struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0)
        requests = client.request(WRITE, 1, 0, 100_000) + bytes(100_000)
        client.send(struct.pack(">I", 3) + go + requests + client.request(READ, 2, 0, 8))
        while client.reply()[1] != ACK:
            pass
        assert {client.simple()[0], client.simple()[0]} == {1, 2}
        assert client.receive(8) == b"r" * 8


# -- what the system refuses -----------------------------------------------------------------------


class Unlucky(socket.socket):
    """A listening socket whose accept fails as often as there are `failures`."""

    failures: list[OSError]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            raise self.failures.pop()
        return super().accept()


def test_a_failing_accept_is_not_the_end(sockdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = listen_unix(str(sockdir / "socket"))
    listener = Unlucky(fileno=plain.detach())
    numbers = (errno.EMFILE, errno.ENETDOWN, errno.EPROTO, errno.EPERM, errno.ECONNABORTED)
    listener.failures = [OSError(number, os.strerror(number)) for number in numbers]
    server = Server(Chain(Recorder()), [listener])
    server.start()
    with Raw(str(sockdir / "socket")) as client:
        assert client.size == SIZE
    server.close()
    text = capsys.readouterr().err
    assert text.count("error: accept: ") == 4
    assert "Traceback" not in text


def test_a_server_that_cannot_accept_rests_and_says_it_once(
    sockdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the log nor the processor is filled while the trouble lasts."""
    plain = listen_unix(str(sockdir / "socket"))
    listener = Unlucky(fileno=plain.detach())
    listener.failures = [OSError(errno.EMFILE, "Too many open files") for _ in range(8)]
    server = Server(Chain(Recorder()), [listener])
    server.start()
    began = time.monotonic()
    with Raw(str(sockdir / "socket")) as client:
        assert client.size == SIZE
        assert time.monotonic() - began >= 7 * server_module.SLICE
    server.close()
    assert capsys.readouterr().err == "pynbdkit: error: accept: Too many open files\n"


def test_the_same_trouble_is_said_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    server = Server(Chain(Recorder()))
    for step in (0.0, 1.0, 5.0, QUIET, 0.0):
        now += step
        server._complain("too many")
    server._complain("another")
    server.close()
    server.run()
    assert capsys.readouterr().err.split("error: ")[1:] == [
        "too many\npynbdkit: ",
        "too many\npynbdkit: ",
        "another\n",
    ]


def test_a_server_that_rests_can_be_stopped(sockdir: Path) -> None:
    plain = listen_unix(str(sockdir / "socket"))
    listener = Unlucky(fileno=plain.detach())
    listener.failures = [OSError(errno.EMFILE, "Too many open files") for _ in range(1000)]
    server = Server(Chain(Recorder()), [listener])
    server.start()
    with Raw(str(sockdir / "socket"), go=False) as client:
        assert becomes(lambda: len(listener.failures) < 1000)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 5
        assert client.at_end()


def test_out_of_descriptors(serve: Callable[..., Any]) -> None:
    """Who is connected goes on; who comes waits, and is served when there is room."""
    server = serve("memory", "1M")
    pid = server.process.pid
    with Raw(str(server.socket)) as first:
        used = len(os.listdir(f"/proc/{pid}/fd"))
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, hard))
        others = [Raw(str(server.socket), go=False) for _ in range(10)]
        assert becomes(lambda: "accept: Too many open files" in server.log())
        first.ask(READ, 1, 0, 512)
        assert first.receive(16 + 512)[4:8] == bytes(4)
        for other in others:  # each leaves room for the next
            assert other.receive(8) == b"NBDMAGIC"
            other.close()
        with Raw(str(server.socket)) as last:
            assert last.size == SIZE
    assert server.log().count("Too many open files") <= 2


# -- many clients, and slow ones -------------------------------------------------------------------


BEGINNINGS = {
    "says nothing": b"",
    "half its flags": b"\0\0",
    "no option": b"\0\0\0\3",
    "half an option": b"\0\0\0\3IHAVEOPT\0\0",
    "no payload": b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6",
    "an option at a time": b"\0\0\0\3IHAVEOPT\0\0\0\x08\0\0\0\0",
}


def test_clients_that_stall_in_their_handshake_hold_up_nobody() -> None:
    with serving(Recorder()) as server:
        stalled = [client_of(server, go=False) for _ in range(5 * len(BEGINNINGS))]
        for client, beginning in zip(stalled, [*BEGINNINGS.values()] * 5, strict=True):
            client.send(beginning)
        with client_of(server) as client:
            assert client.size == SIZE
        for client in stalled:
            assert client.receive(18)[:8] == b"NBDMAGIC"
            client.close()
        assert becomes(lambda: server.connections == 0)


@pytest.mark.parametrize("tcp", [False, True])
def test_a_storm_of_clients_is_served_to_the_last(tcp: bool) -> None:
    """All of them at once: what the queue of the listening socket does not hold waits."""
    options: dict[str, Any] = {"tcp": ("127.0.0.1", 0)} if tcp else {}
    with serving(Recorder(), **options) as server:
        connect = over_tcp if tcp else client_of
        clients = [connect(server, go=False) for _ in range(300)]
        for client in clients:
            assert client.receive(18)[:8] == b"NBDMAGIC"
        assert server.connections == 300
        for client in clients:
            client.close()
        assert becomes(lambda: server.connections == 0)


def test_tcp_clients_that_go_silent_are_found_out() -> None:
    """The values are tested with `tune`; here, that every accepted client gets them."""
    with serving(Recorder(), tcp=("127.0.0.1", 0)) as server, over_tcp(server) as client:
        assert client.sock
        (connection,) = server._server._connections
        options = socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT, socket.TCP_NODELAY
        found = [connection._sock.getsockopt(socket.IPPROTO_TCP, option) for option in options]
        assert found == [60, 8, 1]


def test_a_client_for_whom_there_is_no_thread_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = threading.Thread.start

    def no_start(thread: threading.Thread) -> None:
        if thread.name.startswith("connection"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving(Recorder()) as server:
        monkeypatch.setattr(threading.Thread, "start", no_start)
        with client_of(server, go=False) as client:
            assert client.at_end()
        assert becomes(lambda: server.connections == 0)
        monkeypatch.setattr(threading.Thread, "start", start)
        with client_of(server) as client:
            assert client.size == SIZE
    assert "cannot serve a client: can't start new thread" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("blocking", [True, None])
def test_requests_for_which_there_is_no_thread(
    left: int,
    blocking: bool | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fewer workers than there might be serve the connection, or its own thread does."""
    start = threading.Thread.start
    many = threading.Semaphore(left)

    def some_start(thread: threading.Thread) -> None:
        if not many.acquire(blocking=False):
            raise RuntimeError("can't start new thread")
        start(thread)

    nothing = threading.Event()
    plugin = Recorder(
        blocking=blocking, on_call=lambda session, offset: (nothing.wait(0.001), None)[1]
    )
    with serving(plugin) as server, client_of(server) as client:
        client.ask(FLUSH, 1, 1)  # refused: and the connection is in its transmission phase
        client.simple()
        monkeypatch.setattr(threading.Thread, "start", some_start)
        for _ in range(3):  # calls that declare nothing are for threads when they have waited
            client.send(b"".join(client.request(READ, n, n, 8) for n in range(50)))
            assert {client.simple(8)[0] for _ in range(50)} == set(range(50))
        monkeypatch.setattr(threading.Thread, "start", start)
    assert plugin.events[-3:] == ["close  0", "cleanup", "unload"]
    log = capsys.readouterr().err
    assert log.count("a thread cannot be started") == 1, log  # not once for each request
    assert "Traceback" not in log


def test_without_a_thread_a_waiting_call_is_just_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, release = threading.Event(), threading.Event()

    def on_call(session: Session, offset: int) -> None:
        if offset == 0:
            inside.set()
            until(release)

    start = threading.Thread.start

    def no_start(thread: threading.Thread) -> None:
        if sys._getframe(1).f_globals["__name__"].startswith("pynbdkit"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving(Recorder(on_call=on_call), release) as server, client_of(server) as client:
        client.ask(READ, 1, 8, 8)
        assert client.simple(8)[0] == 1
        monkeypatch.setattr(threading.Thread, "start", no_start)
        client.ask(READ, 2, 0, 8)
        until(inside)
        client.ask(READ, 3, 8, 8)
        inside.clear()
        assert not inside.wait(NOT_YET)
        release.set()
        assert [client.simple(8)[0] for _ in range(2)] == [2, 3]
        monkeypatch.setattr(threading.Thread, "start", start)


def test_the_strictest_model_is_served_all_the_same() -> None:
    """One client after another, with all that serialize_connections has to lock."""
    plugin = Recorder(thread_model=ThreadModel.SERIALIZE_CONNECTIONS)
    with serving(plugin) as server:
        for _ in range(5):
            with client_of(server) as client:
                client.ask(READ, 1, 0, 8)
                assert client.simple(8)[:2] == (1, 0)
    assert plugin.events.count("close  0") == 5
