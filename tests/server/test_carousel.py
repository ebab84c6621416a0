"""One thread for all who are busy with quick calls: who rides, what gets them off, what goes wrong.

Connections ride here at their first batch that follows another's (`eager`), and nothing gets them
off by itself: neither silence nor the clock. Where a test has to see that something does not
happen, it looks for a moment (`NOT_YET`).
"""

from __future__ import annotations

import errno
import os
import random
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
from bare import bare_transmission
from pynbdkit import Device, Fua, Plugin, RunningServer, Session, ThreadModel
from pynbdkit.protocol.requests import RequestParser
from pynbdkit.server import (
    carousel,
    company,
    crew,
    receiver,
    runner,
    sender,
    server,
    waiting,
    watch,
)
from pynbdkit.server.carousel import Carousel
from pynbdkit.server.company import LARGE_WRITE, SMALL_REQUEST
from pynbdkit.server.crew import Crew
from pynbdkit.server.transmission import EPOLLIN, EPOLLOUT, Transmission
from pynbdkit.session import current
from raw import DISC, READ, WRITE, Raw

SIZE = 4 << 20
WAIT = 20.0
"""Seconds after which a test gives up: nothing that works takes that long."""
NOT_YET = 0.05
"""Seconds that a test looks for what must not happen."""
ROUNDS = 500
"""So many times all clients ask in turn, before a test gives up to see them ride."""
CONTENT = random.Random(5).randbytes(SIZE)


class Disk(Device):
    """A shared RAM disk; which threads read, and for which session, is noted."""

    def __init__(self, plugin: Disks, session: Session) -> None:
        self.plugin = plugin
        self.session = session

    def get_size(self) -> int:
        return SIZE

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        plugin = self.plugin
        plugin.ran.append(threading.current_thread().name)
        plugin.strangers += current() is not self.session
        plugin.on_read(offset)
        return bytes(plugin.data[offset : offset + count])

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self.plugin.ran.append(threading.current_thread().name)
        self.plugin.data[offset : offset + len(buf)] = buf

    def close(self) -> None:
        self.plugin.closed += 1


class Disks(Plugin):
    """`on_read` is called with the offset of each read; `ran` has the threads of the calls."""

    name = "disks"

    def __init__(
        self,
        blocking: bool | None = False,
        on_read: Callable[[int], object] = lambda offset: None,
        model: int = ThreadModel.PARALLEL,
    ) -> None:
        super().__init__()
        self.blocking = blocking
        self.on_read = on_read
        self.thread_model = model
        self.data = bytearray(CONTENT)
        self.ran: list[str] = []
        self.strangers = 0
        self.closed = 0

    def open(self, session: Session) -> Device:
        return Disk(self, session)


class Client(Raw):
    def __init__(self, server: RunningServer) -> None:
        assert server.socket is not None
        super().__init__(server.socket)

    def __enter__(self) -> Client:
        return self

    def expect(self, offset: int, count: int = 512) -> None:
        """Receive the reply to a read whose cookie is its offset."""
        assert self.simple(count) == (offset, 0, CONTENT[offset : offset + count])

    def read(self, offset: int = 512, count: int = 512) -> None:
        self.ask(READ, offset, offset, count)
        self.expect(offset, count)

    def several(self, offsets: range, count: int) -> None:
        """Reads in one go."""
        self.send(b"".join(self.request(READ, offset, offset, count) for offset in offsets))

    def expect_several(self, offsets: range, count: int) -> None:
        """Receive the replies of `several`, in any order."""
        left = set(offsets)
        while left:
            cookie, error, data = self.simple(count)
            assert (error, data) == (0, CONTENT[cookie : cookie + count])
            left.remove(cookie)


@contextmanager
def serving(
    plugin: Disks, clients: int, release: threading.Event | None = None
) -> Iterator[tuple[RunningServer, list[Client]]]:
    """Serve to so many clients; `release` is set before the server is stopped."""
    with pynbdkit.serve(plugin) as running:
        connected = [Client(running) for _ in range(clients)]
        try:
            yield running, connected
        finally:
            if release is not None:
                release.set()
            for client in connected:
                client.close()


def board(plugin: Disks, *clients: Client) -> None:
    """Have all clients ask in turn, until the carousel serves them all."""
    for _ in range(ROUNDS):
        plugin.ran.clear()
        for client in clients:
            client.read()
        if set(plugin.ran) == {"carousel"}:
            return
    raise AssertionError(f"after {ROUNDS} rounds: {plugin.ran}")


def riders(running: RunningServer) -> int:
    return len(running._server.carousel._riders)


def awaited(running: RunningServer) -> list[int]:
    """What the carousel waits for, of each who rides."""
    return [rider.awaited for rider in list(running._server.carousel._riders.values())]


def until(condition: Callable[[], object]) -> None:
    """Wait for what other threads do, and give no event for."""
    pause = threading.Event()
    for _ in range(int(WAIT / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it does not happen")


@pytest.fixture(autouse=True)
def eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Get on at once, and get off for no reason of time, on however slow a machine."""
    monkeypatch.setattr(company, "MANY", 0)
    if "nbd" not in request.fixturenames:
        monkeypatch.setattr(company, "SEVERAL", 2)
        monkeypatch.setattr(carousel, "SWEEP", 1000.0)
        monkeypatch.setattr(waiting, "SLOW_CALL", 1000.0)
        monkeypatch.setattr(watch, "TICK", 0.02)
        monkeypatch.setattr(sender, "ROOM", 0)  # a socket takes less than a batch of replies


@pytest.fixture
def release() -> threading.Event:
    """What calls wait for."""
    return threading.Event()


# -- who rides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [False, None])
def test_busy_connections_are_served_by_one_thread(
    nbd: ModuleType, connect: Callable[..., Any], blocking: bool | None
) -> None:
    """With a client that we did not write, and the real numbers."""
    threads = set()
    plugin = Disks(blocking, lambda offset: threads.add(threading.get_ident()))
    with pynbdkit.serve(plugin) as running:
        handles = [connect(running) for _ in range(4)]
        for _ in range(ROUNDS):
            plugin.ran.clear()
            threads.clear()
            for number, handle in enumerate(handles):
                assert handle.pread(512, 512 * number) == CONTENT[512 * number :][:512]
            if set(plugin.ran) == {"carousel"}:
                break
        else:
            raise AssertionError(plugin.ran)
        assert len(threads) == 1
        for handle in handles:
            handle.shutdown()
        assert riders(running) == 0


@pytest.mark.parametrize(
    ("model", "blocking", "rides"),
    [
        (ThreadModel.PARALLEL, False, True),
        (ThreadModel.PARALLEL, None, True),
        (ThreadModel.PARALLEL, True, False),
        (ThreadModel.SERIALIZE_REQUESTS, False, True),
        (ThreadModel.SERIALIZE_REQUESTS, None, False),  # nobody could leave a call behind
        (ThreadModel.SERIALIZE_ALL_REQUESTS, False, False),
        (ThreadModel.SERIALIZE_ALL_REQUESTS, None, False),
    ],
)
def test_who_may_ride(model: int, blocking: bool | None, rides: bool) -> None:
    plugin = Disks(blocking, model=model)
    with serving(plugin, 3) as (_, clients):
        if rides:
            board(plugin, *clients)
        else:
            for _ in range(20):
                for client in clients:
                    client.read()
            assert "carousel" not in plugin.ran


@pytest.mark.parametrize("model", [ThreadModel.PARALLEL, ThreadModel.SERIALIZE_REQUESTS])
def test_replies_keep_their_order_on_the_carousel_and_off_it(model: int) -> None:
    plugin = Disks(model=model)
    with serving(plugin, 2) as (_, (client, other)):
        sizes = [512 * (1 + number % 7) for number in range(400)]
        sizes[100] = sizes[250] = 1 << 20
        for _ in range(3):
            board(plugin, client, other)
            client.send(b"".join(client.request(READ, n, n, size) for n, size in enumerate(sizes)))
            for n, size in enumerate(sizes):
                client.expect(n, size)


def test_the_same_bytes_whatever_their_size(release: threading.Event) -> None:
    """Large ones get off, and on again; their neighbours do not notice."""
    plugin = Disks()
    with serving(plugin, 3) as (_, (client, second, third)):
        for count in (SMALL_REQUEST, SMALL_REQUEST + 1, 256 << 10, 2 << 20):
            board(plugin, client, second, third)
            payload = random.Random(count).randbytes(count)
            client.ask(WRITE, 1, 1 << 20, count, payload=payload)
            assert client.simple() == (1, 0, b"")
            second.read()
            board(plugin, client, second, third)
            client.ask(READ, 2, 1 << 20, count)
            assert client.simple(count) == (2, 0, payload)
            third.read()


def test_a_payload_that_comes_in_pieces_does_not_hold_up_others() -> None:
    plugin = Disks()
    with serving(plugin, 2) as (_, (client, other)):
        for count in (1000, SMALL_REQUEST, 1 << 20):
            board(plugin, client, other)
            request = client.request(WRITE, 1, 0, count) + CONTENT[:count]
            cuts = sorted([0, 10, 28, 100, 900, count // 2, count + 27, count + 28])
            for start, end in pairwise(cuts):
                client.send(request[start:end])
                other.read()
            assert client.simple() == (1, 0, b"")
            # Where much is to come, its own thread takes the whole rest at once.
            assert ("connection-1" in plugin.ran) == (count > SMALL_REQUEST)


def test_what_is_large_runs_in_its_own_thread() -> None:
    plugin = Disks()
    with serving(plugin, 2) as (_, (client, other)):
        board(plugin, client, other)
        plugin.ran.clear()
        for count in (SMALL_REQUEST, SMALL_REQUEST + 1, SMALL_REQUEST + 1):
            client.read(0, count)
        assert plugin.ran == ["carousel", "carousel", "connection-1"]


@pytest.mark.parametrize("gather", [1 << 20, 1024])
@pytest.mark.parametrize("blocking", [False, None])
def test_a_batch_with_more_replies_than_are_gathered_is_finished_elsewhere(
    blocking: bool | None, gather: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GATHER", gather)
    count = gather // 32
    plugin = Disks(blocking)
    offsets = range(0, 96 * count, count)
    with serving(plugin, 2) as (_, (client, other)):
        board(plugin, client, other)
        plugin.ran.clear()
        client.several(offsets, count)
        client.expect_several(offsets, count)
        assert {"carousel", "connection-1"} <= set(plugin.ran)
        other.read()
        board(plugin, client, other)


def test_each_rider_has_its_session_and_its_name_in_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def on_read(offset: int) -> None:
        if offset == 1024:
            raise OSError(errno.EIO, "a bad block")

    plugin = Disks(on_read=on_read)
    with serving(plugin, 3) as (_, clients):
        for number in (1, 3, 2, 1):
            board(plugin, *clients)
            plugin.ran.clear()
            clients[number - 1].ask(READ, 7, 1024, 512)
            assert clients[number - 1].simple() == (7, errno.EIO, b"")
            assert plugin.ran == ["carousel"]
            (line,) = re.findall(r".*a bad block", capsys.readouterr().err)[:1]
            assert line.startswith(f"pynbdkit: disks[{number}]: error: disks: pread: offset 1024,")
    assert plugin.strangers == 0


# -- who gets off ----------------------------------------------------------------------------------


def test_who_is_alone_gets_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carousel, "ALONE", 50)
    plugin = Disks()
    with serving(plugin, 2) as (running, (busy, silent)):
        board(plugin, busy, silent)
        plugin.ran.clear()
        for _ in range(60):
            busy.read()
        assert plugin.ran[:50] == ["carousel"] * 50
        assert plugin.ran[-5:] == ["connection-1"] * 5
        assert riders(running) == 1
        silent.read()
        assert plugin.ran[-1] == "carousel"


def test_others_in_between_are_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carousel, "ALONE", 50)
    plugin = Disks()
    with serving(plugin, 2) as (_, (busy, other)):
        board(plugin, busy, other)
        plugin.ran.clear()
        for _ in range(4):
            for _ in range(40):
                busy.read()
            other.read()
        assert set(plugin.ran) == {"carousel"}


def test_only_who_is_silent_gets_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(carousel, "monotonic", lambda: now)
    plugin = Disks()
    with serving(plugin, 3) as (running, (busy, *silent)):
        board(plugin, busy, *silent)
        now += 1001
        busy.read()  # then it looks who has moved since the beginning: all have
        busy.read()
        assert riders(running) == 3
        now += 1001
        busy.read()
        until(lambda: riders(running) == 1)
        plugin.ran.clear()
        for client in (busy, *silent):
            client.read()
        assert plugin.ran == ["carousel", "connection-2", "connection-3"]


def test_all_get_off_when_all_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carousel, "SWEEP", 0.03)
    plugin = Disks()
    with serving(plugin, 3) as (running, (busy, *silent)):
        before = len(os.listdir("/proc/self/fd"))
        board(plugin, busy, *silent)

        until(lambda: riders(running) == 0)
        until(lambda: len(os.listdir("/proc/self/fd")) == before)  # and nothing is left of it
        for client in silent:
            plugin.ran.clear()
            client.read()
            assert plugin.ran[0] in ("connection-2", "connection-3")
        board(plugin, busy, *silent)


@pytest.mark.parametrize("size", [SIZE, SIZE // 8], ids=["more", "less than are gathered"])
def test_a_client_that_takes_no_replies_hurts_itself_alone(size: int) -> None:
    plugin = Disks()
    offsets = range(0, size, SMALL_REQUEST)
    with serving(plugin, 3) as (_, (rude, second, third)):
        board(plugin, rude, second, third)
        rude.several(offsets, SMALL_REQUEST)
        for _ in range(50):
            second.read()
            third.read()
        rude.expect_several(offsets, SMALL_REQUEST)
        board(plugin, rude, second, third)


def test_a_client_that_takes_its_replies_slowly_rides_on() -> None:
    """The carousel waits for room for the rest, and does not look at its requests meanwhile."""
    plugin = Disks()
    offsets = range(0, SIZE // 8, SMALL_REQUEST)
    with serving(plugin, 3) as (running, (slow, second, third)):
        board(plugin, slow, second, third)
        slow.several(offsets, SMALL_REQUEST)
        until(lambda: awaited(running).count(EPOLLOUT) == 1)
        slow.several(range(8, 24, 8), 8)
        plugin.ran.clear()
        for _ in range(20):
            second.read()
            third.read()
        assert plugin.ran == ["carousel"] * 40
        slow.expect_several(offsets, SMALL_REQUEST)
        slow.expect_several(range(8, 24, 8), 8)
        assert plugin.ran == ["carousel"] * 42
        assert awaited(running) == [EPOLLIN] * 3


@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_goes_while_the_carousel_waits_for_room(half: bool) -> None:
    plugin = Disks()
    offsets = range(0, SIZE // 8, SMALL_REQUEST)
    with serving(plugin, 3) as (running, (gone, second, third)):
        board(plugin, gone, second, third)
        gone.several(offsets, SMALL_REQUEST)
        until(lambda: awaited(running).count(EPOLLOUT) == 1)
        if half:  # no more requests: what it has asked for is answered
            gone.sock.shutdown(socket.SHUT_WR)
            second.read()
            gone.expect_several(offsets, SMALL_REQUEST)
            assert gone.at_end()
        else:
            gone.close()
        until(lambda: running.connections == 2)
        board(plugin, second, third)


def test_large_writes_ride_together_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads do not, where calls make none into the kernel: who goes over to them gets off."""
    monkeypatch.setattr(company, "MANY", 3)
    plugin = Disks(False)
    with serving(plugin, 2) as (running, clients):
        for _ in range(ROUNDS):
            plugin.ran.clear()
            for client in clients:
                client.ask(WRITE, 1, 0, LARGE_WRITE, payload=CONTENT[:LARGE_WRITE])
                assert client.simple() == (1, 0, b"")
            if set(plugin.ran) == {"carousel"}:
                break
        assert riders(running) == 2
        for _ in range(100):
            for client in clients:
                client.read()
        assert riders(running) == 0


@pytest.mark.parametrize("blocking", [False, None])
def test_nobody_gets_on_with_a_request_that_was_received_ahead(blocking: bool | None) -> None:
    """The carousel waits for the socket, which has nothing more to tell."""
    plugin = Disks(blocking)
    size = receiver.LARGE_PAYLOAD
    with serving(plugin, 2) as (_, (client, other)):
        for _ in range(10):
            for _ in range(5):
                client.read(0, SMALL_REQUEST + 1)  # and nobody else: it is alone, and does not ride
            other.read()
            write = client.request(WRITE, 1, 0, size) + CONTENT[:size]
            client.send(write + client.request(READ, 512, 512, 512))
            assert client.simple() == (1, 0, b"")
            client.expect(512)


def test_who_rides_knows_that_it_is_not_alone() -> None:
    """For the receiver, which does not look before it waits, then."""
    ours, theirs = socket.socketpair()
    place = Carousel()
    with ours, theirs:
        one, other = (bare_transmission(ours, Disks().open(Session()), place) for _ in range(2))
        for _ in range(5):
            one._look_around([(0, READ, 1, 0, 512, None)])
        assert one.receiver.alone
        other._look_around([(0, READ, 1, 0, 512, None)])
        one._look_around([(0, READ, 1, 0, 512, None)])
        assert not one.receiver.alone
        assert not other.receiver.alone


def test_no_room_after_all_is_for_its_own_thread() -> None:
    """Woken for nothing it gets off: it must not be asked again and again."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = alone(ours)
        one.get_on()
        one.awaited = EPOLLOUT
        ours.setblocking(True)
        one.runner.ready += [bytes(1 << 20)] * 3
        assert one.turn() == EPOLLOUT  # some of it
        assert one.turn() == 0
        received = 0
        while received < 3 << 20:
            received += len(theirs.recv(1 << 20))
            one.sender.send_without_waiting()
        one.awaited = EPOLLOUT
        assert one.turn() == EPOLLIN


def test_who_got_off_has_to_find_company_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "SEVERAL", 8)
    plugin = Disks()
    with serving(plugin, 2) as (_, (client, other)):
        board(plugin, client, other)
        client.read(0, SMALL_REQUEST + 1)
        plugin.ran.clear()
        for _ in range(4):
            other.read()
            client.read()
        assert plugin.ran[1::2] == ["connection-1"] * 4


ENDS = {
    "nothing": b"",
    "goodbye": Raw.request(DISC, 9),
    "garbage": b"\xff" * 100,
    "request, goodbye": Raw.request(READ, 512, 512, 512) + Raw.request(DISC, 9),
    "request, garbage": Raw.request(READ, 512, 512, 512) + b"\xff" * 100,
    "half a request": Raw.request(READ, 512, 512, 512)[:20],
    "half a payload": Raw.request(WRITE, 512, 512, 512) + bytes(100),
    "half a large payload": Raw.request(WRITE, 512, 512, 1 << 20) + bytes(100),
}


@pytest.mark.parametrize("blocking", [False, None])
@pytest.mark.parametrize("end", list(ENDS))
def test_the_end_of_one_leaves_the_others_alone(end: str, blocking: bool | None) -> None:
    plugin = Disks(blocking)
    with serving(plugin, 3) as (running, (client, second, third)):
        board(plugin, client, second, third)
        client.send(ENDS[end])
        if end.startswith("request"):
            client.expect(512)
        if end.endswith(("goodbye", "garbage")):
            assert client.at_end()  # at once: not at the next request, nor when it is swept
        client.close()
        until(lambda: running.connections == 2)
        assert plugin.closed == 1
        board(plugin, second, third)
        assert riders(running) == 2


def test_connections_come_and_go_and_leave_nothing() -> None:
    """Descriptors are used again, also those of riders."""
    plugin = Disks()
    with serving(plugin, 2) as (running, stay):
        board(plugin, *stay)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with Client(running) as guest:
                board(plugin, guest, *stay)
                guest.send(guest.request(DISC, 9))
                assert guest.at_end()
            until(lambda: running.connections == 2)
            for client in stay:
                client.read()
        assert len(os.listdir("/proc/self/fd")) == before
        for client in stay:
            client.close()
        until(lambda: running.connections == 0)
        assert running._server.carousel.last is None  # what has ended is not kept


# -- calls that wait -------------------------------------------------------------------------------


def stuck(release: threading.Event) -> tuple[threading.Event, Callable[[int], None]]:
    """A read at 8 sets the first, and waits for `release`."""
    entered = threading.Event()

    def on_read(offset: int) -> None:
        if offset == 8:
            entered.set()
            assert release.wait(WAIT)

    return entered, on_read


def wait_on_the_carousel(
    plugin: Disks, client: Client, others: list[Client], entered: threading.Event
) -> None:
    """Have the client's read at 8 wait, in the carousel's thread."""
    board(plugin, client, *others)
    entered.clear()
    plugin.ran.clear()
    client.ask(READ, 8, 8, 512)
    assert entered.wait(WAIT)
    assert plugin.ran == ["carousel"]


@pytest.mark.parametrize("calls", [1, 3])
def test_calls_that_wait_hold_up_nobody(
    calls: int, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "SAMPLE", 16)
    monkeypatch.setattr(waiting, "QUICK_CALL", 10.0)
    entered, on_read = stuck(release)
    plugin = Disks(None, on_read)
    with serving(plugin, 5, release) as (_, clients):
        for _ in range(3):
            release.clear()
            for number in range(calls):
                wait_on_the_carousel(plugin, clients[number], clients[number + 1 :], entered)
            for client in clients:  # also those that have a call waiting
                for _ in range(20):
                    client.read()
            release.set()
            for client in clients[:calls]:
                client.expect(8)
            for client in clients:  # what was dispatched is quick again
                for _ in range(20):
                    client.read()
        board(plugin, *clients)
    assert plugin.strangers == 0
    assert threading.active_count() < 20


def test_what_came_with_a_call_that_waits_is_answered(release: threading.Event) -> None:
    """The rest of its batch, and what is not there yet; its own reply comes when it ends."""
    _, on_read = stuck(release)
    plugin = Disks(None, on_read)
    offsets = range(1024, 1024 + 512 * 50, 512)
    with serving(plugin, 2, release) as (_, (client, other)):
        board(plugin, client, other)
        client.send(
            client.request(READ, 8, 8, 512)
            + b"".join(client.request(READ, offset, offset, 512) for offset in offsets)
            + client.request(READ, 16, 16, 512)[:10]
        )
        client.expect_several(offsets, 512)
        client.send(client.request(READ, 16, 16, 512)[10:])
        client.expect(16)
        other.read()
        release.set()
        client.expect(8)


def test_the_end_of_a_client_whose_call_waits(release: threading.Event) -> None:
    entered, on_read = stuck(release)
    plugin = Disks(None, on_read)
    with serving(plugin, 3, release) as (running, (client, *others)):
        wait_on_the_carousel(plugin, client, others, entered)
        board(plugin, *others)  # somebody else runs the carousel now
        client.close()
        for other in others:
            other.read()
        assert plugin.closed == 0
        release.set()
        until(lambda: running.connections == 2)
        assert plugin.closed == 1
        board(plugin, *others)


def test_a_reader_that_is_left_behind_as_its_call_ends_does_not_ride(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else is the reader then; and two readers take each other's bytes."""
    rode = threading.Event()
    ride, leave_behind = Carousel.ride, Crew.leave_behind

    def note(self: Carousel, one: Transmission) -> None:
        if threading.current_thread().name == "connection-2":
            rode.set()
        ride(self, one)

    def slow(self: Crew, target: Callable[[], None]) -> bool:
        left = leave_behind(self, target)
        release.set()  # the call ends after all, before the reader was told
        rode.wait(NOT_YET)
        return left

    monkeypatch.setattr(Carousel, "ride", note)
    monkeypatch.setattr(Crew, "leave_behind", slow)
    entered, on_read = stuck(release)
    plugin = Disks(None, on_read)
    request = Raw.request(READ, 512, 512, 512)
    with serving(plugin, 2, release) as (_, (other, client)):
        other.read()
        client.ask(READ, 8, 8, 512)
        assert entered.wait(WAIT)
        client.send(request[:1])  # it is not held up for nothing
        client.expect(8)
        for byte in request[1:]:
            client.send(bytes([byte]))
            other.read()
        client.expect(512)
    assert not rode.is_set()


@pytest.mark.parametrize("more_comes", [False, True])
def test_a_turn_that_ends_while_its_connection_is_being_left_behind(
    more_comes: bool, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes just then is for the new reader alone; and the old one does not wait for ever."""
    leave_behind = Crew.leave_behind
    entered, on_read = stuck(release)
    more = threading.Event()
    offsets, count = range(0, 96 * 1024, 1024), 32 << 10

    def slow(self: Crew, target: Callable[[], None]) -> bool:
        left = leave_behind(self, target)
        if not more.is_set():
            release.set()
            client.expect(8)  # its turn on the carousel has ended
            if more_comes:
                client.several(offsets, count)
            threading.Event().wait(NOT_YET)
            more.set()
        return left

    monkeypatch.setattr(Crew, "leave_behind", slow)
    plugin = Disks(None, on_read)
    with serving(plugin, 3, release) as (running, (client, *others)):
        wait_on_the_carousel(plugin, client, others, entered)
        assert more.wait(WAIT)
        if not more_comes:
            until(lambda: riders(running) == 2)
            client.several(offsets, count)
        client.expect_several(offsets, count)
        board(plugin, *others)
        client.read()
        client.close()
        until(lambda: running.connections == 2)


def alone(sock: socket.socket) -> Transmission:
    """A transmission that nobody runs."""
    return bare_transmission(sock, Disks(None).open(Session()))


def test_no_turn_for_who_was_left_behind() -> None:
    """The carousel had chosen it just before: it must not take the new reader's bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = alone(ours)
        request = Raw.request(READ, 8, 8, 512)
        theirs.sendall(request)
        one.get_on()
        one._epoch += 1
        assert one.turn() == 0
        assert ours.recv(100) == request
        with one._turn:  # it is being left behind, or somebody receives
            assert one.turn() == EPOLLIN


def test_calls_that_wait_a_little_get_off_and_run_in_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, nothing = threading.Event(), threading.Event()
    plugin = Disks(None, lambda offset: nothing.wait(0.001) if slow.is_set() else None)
    with serving(plugin, 2) as (_, (client, other)):
        board(plugin, client, other)
        monkeypatch.setattr(waiting, "SLOW_CALL", 60e-6)
        slow.set()
        for _ in range(ROUNDS):
            plugin.ran.clear()
            client.several(range(0, 1024, 64), 64)
            client.expect_several(range(0, 1024, 64), 64)
            if "carousel" not in plugin.ran:
                break
        else:
            raise AssertionError(plugin.ran)
        assert len(set(plugin.ran)) > 1
        other.read()


def test_writes_that_are_made_stable_get_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait by nature, and are not moved to threads for that: others must not wait as well."""
    nothing = threading.Event()

    class Stable(Disk):
        def can_fua(self) -> int:
            return Fua.NATIVE

        def pwrite(self, buf: Any, offset: int, flags: int) -> None:
            super().pwrite(buf, offset, flags)
            nothing.wait(0.001 if flags else 0)

        def pwrite_group(self, writes: Sequence[tuple[Any, int]]) -> bool:
            return False

    class Stables(Disks):
        def open(self, session: Session) -> Device:
            return Stable(self, session)

    plugin = Stables(None)
    with serving(plugin, 2) as (_, (client, other)):
        board(plugin, client, other)
        monkeypatch.setattr(waiting, "SLOW_CALL", 0.0005)
        plugin.ran.clear()
        for _ in range(3):
            client.ask(WRITE, 1, 0, 512, flags=1, payload=CONTENT[:512])
            assert client.simple() == (1, 0, b"")
            other.read()
        assert plugin.ran[::2] == ["carousel", "connection-1", "connection-1"]
        board(plugin, client, other)


# -- what a plugin may ask for ---------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [False, None])
@pytest.mark.parametrize("force", [False, True])
def test_a_plugin_ends_a_connection(force: bool, blocking: bool | None) -> None:
    def on_read(offset: int) -> None:
        if offset == 8:
            session = current()
            assert session is not None
            session.disconnect(force)

    plugin = Disks(blocking, on_read)
    with serving(plugin, 3) as (running, (client, *others)):
        board(plugin, client, *others)
        client.ask(READ, 8, 8, 512)
        if not force:
            client.expect(8)
        assert client.at_end()
        until(lambda: running.connections == 2)
        board(plugin, *others)


@pytest.mark.parametrize("blocking", [False, None])
def test_a_plugin_stops_the_server(blocking: bool | None) -> None:
    plugin = Disks(blocking, lambda offset: pynbdkit.session.shutdown() if offset == 8 else None)
    with serving(plugin, 3) as (running, clients):
        board(plugin, *clients)
        clients[1].read(8)
        for client in clients:
            assert client.at_end()
        until(lambda: running.connections == 0)
        assert plugin.closed == 3


@pytest.mark.parametrize("blocking", [False, None])
def test_a_stop_lets_calls_end_and_answers_them(
    blocking: bool | None, release: threading.Event
) -> None:
    entered, on_read = stuck(release)
    plugin = Disks(blocking, on_read)
    before = len(os.listdir("/proc/self/fd"))
    with serving(plugin, 3, release) as (running, (client, *others)):
        wait_on_the_carousel(plugin, client, others, entered)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        assert running._server.stopping.wait(WAIT)
        release.set()
        client.expect(8)
        for one in (client, *others):
            assert one.at_end()
        stopping.join(WAIT)
        assert not stopping.is_alive()
        assert plugin.closed == 3
    assert not [t for t in threading.enumerate() if t.name in ("carousel", "watch")]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [SIZE, SIZE // 8], ids=["its own thread", "the carousel"])
def test_a_stop_cuts_off_who_takes_no_replies(
    size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "STOP_PATIENCE", NOT_YET)
    plugin = Disks()
    with serving(plugin, 2) as (running, (rude, other)):
        board(plugin, rude, other)
        rude.several(range(0, size, SMALL_REQUEST), SMALL_REQUEST)
        rude.expect(0, SMALL_REQUEST)
        other.read()
        running.stop()
        assert other.at_end()
    assert "1 client(s) do not take their replies" in capsys.readouterr().err


# -- when the system refuses, or we are wrong ------------------------------------------------------


def go_on_without(plugin: Disks, running: RunningServer, clients: list[Client]) -> None:
    """Everybody is served, and by their own threads."""
    for client in clients:
        client.read()
    until(lambda: riders(running) == 0)
    for _ in range(10):
        plugin.ran.clear()
        for client in clients:
            client.read()
        assert plugin.ran == ["connection-1", "connection-2", "connection-3"]
    assert riders(running) == 0


@pytest.mark.parametrize("what", ["pipe2", "epoll"])
def test_without_descriptors_each_is_served_by_its_thread(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = Disks()
    with serving(plugin, 3) as (running, clients):
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            patch.setattr(os if what == "pipe2" else select, what, refuse)
            go_on_without(plugin, running, clients)
            # The watch may be looking at a thread's numbers.
            until(lambda: len(os.listdir("/proc/self/fd")) == before)
        board(plugin, *clients)  # there are some again


@pytest.mark.parametrize("room", [0, 1], ids=["nothing", "its own pipe"])
def test_with_an_epoll_that_takes_no_more_each_is_served_by_its_thread(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """Has `room` for so many descriptors."""

        def __init__(self) -> None:
            self._epoll = epoll()
            self.poll, self.close = self._epoll.poll, self._epoll.close
            self.unregister = self._epoll.unregister

        def register(self, descriptor: int, events: int) -> None:
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room -= 1
            self._epoll.register(descriptor, events)

    epoll = select.epoll
    monkeypatch.setattr(select, "epoll", Full)
    plugin = Disks()
    with serving(plugin, 3) as (running, clients):
        before = len(os.listdir("/proc/self/fd"))
        go_on_without(plugin, running, clients)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        room = 10
        board(plugin, *clients)


def no_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on the system has no thread of this name for us."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == name:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_without_a_thread_for_the_carousel_each_is_served_by_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin = Disks()
    with serving(plugin, 3) as (running, clients):
        with monkeypatch.context() as patch:
            no_thread(patch, "carousel")
            go_on_without(plugin, running, clients)
        board(plugin, *clients)


def test_without_another_thread_for_the_carousel_nobody_waits(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is left behind in a call: the others get off."""
    entered, on_read = stuck(release)
    plugin = Disks(None, on_read)
    with serving(plugin, 3, release) as (running, (client, *others)):
        board(plugin, client, *others)
        no_thread(monkeypatch, "carousel")
        wait_on_the_carousel(plugin, client, others, entered)
        for _ in range(10):
            for other in others:
                other.read()
        assert riders(running) == 0
        release.set()
        client.expect(8)


def test_without_a_thread_for_the_watch_calls_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin = Disks(None)
    with monkeypatch.context() as patch:
        no_thread(patch, "watch")
        with serving(plugin, 3) as (_, clients):
            board(plugin, *clients)


@pytest.mark.parametrize("failure", [MemoryError(), ValueError("a bug")])
def test_a_bug_on_the_carousel_leaves_nobody_behind(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(self: Carousel) -> None:
        if wrong.is_set():
            raise failure

    wrong = threading.Event()
    monkeypatch.setattr(Carousel, "_sweep", sweep)
    monkeypatch.setattr(carousel, "SWEEP", 0.01)
    plugin = Disks()
    with serving(plugin, 3) as (running, clients):
        board(plugin, *clients)
        wrong.set()
        go_on_without(plugin, running, clients)
        with Client(running) as late:
            late.read()
    assert "carousel" in capsys.readouterr().err


def test_a_connection_without_memory_ends_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: RequestParser) -> None:
        raise MemoryError

    plugin = Disks()
    with serving(plugin, 3) as (running, (client, *others)):
        board(plugin, client, *others)
        with monkeypatch.context() as patch:
            patch.setattr(RequestParser, "requests", fail)
            client.ask(READ, 8, 8, 512)
            assert client.at_end()
        until(lambda: running.connections == 2)
        board(plugin, *others)
    assert "out of memory" in capsys.readouterr().err


def test_no_memory_for_the_reader_after_a_call_that_waits(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection ends; and the server can be stopped."""

    def fail(self: RequestParser) -> None:
        raise MemoryError

    monkeypatch.setattr(RequestParser, "detach", fail)
    plugin = Disks(None, lambda offset: release.wait(WAIT) if offset == 8 else None)
    with serving(plugin, 2, release) as (running, (client, other)):
        board(plugin, client, other)
        client.ask(READ, 8, 8, 512)
        assert client.at_end()
        other.read()
        release.set()
        until(lambda: running.connections == 1)
    assert "out of memory" in capsys.readouterr().err
