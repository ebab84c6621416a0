"""Sending: every byte once, in the order of replies, whoever sends and whatever is taken."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbdkit.server import sender
from pynbdkit.server.sender import IOV_MAX, LARGE_REPLY, ROOM, Sender

WAIT = 20.0
"""Seconds after which a test gives up: nothing that works takes that long."""
NOT_YET = 0.05
"""Seconds that a test looks for what must not happen."""
MUCH = 8 << 20
"""More bytes than a socket takes without a reader."""
Pair = tuple[socket.socket, socket.socket]

pieces_of_any_kind = st.lists(
    st.binary(max_size=40).flatmap(
        lambda data: st.sampled_from([data, bytearray(data), memoryview(data)])
    ),
    max_size=30,
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(the server's end, the client's end)."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(WAIT)
    with ours, theirs:
        yield ours, theirs


class Choosy:
    """A socket that takes as many bytes as `takes` says next; none: it would have to wait."""

    def __init__(self, takes: Iterator[int]) -> None:
        self.takes = takes
        self.sent = bytearray()
        self.before: Callable[[], object] = lambda: None
        """Called at each write, with the lock of the sender held."""

    family = socket.AF_INET

    def sendmsg(self, pieces: Sequence[Any], ancillary: Any = (), flags: int = 0) -> int:
        assert 0 < len(pieces) <= IOV_MAX
        self.before()
        data = b"".join(pieces)
        count = min(len(data), next(self.takes))
        if not count and data:
            assert flags == socket.MSG_DONTWAIT
            raise BlockingIOError(errno.EAGAIN, "would wait")
        self.sent += data[:count]
        return count


def choosy(*takes: int) -> Choosy:
    """It takes so many bytes at a time, and then everything."""
    return Choosy(iter([*takes, *[1 << 30] * 100]))


def sender_to(sock: Choosy | socket.socket) -> tuple[Sender, list[Any]]:
    ready: list[Any] = []
    return Sender(sock, ready), ready  # type: ignore[arg-type]


def room(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(1 << 20)
        assert piece, f"{len(data)} of {count} bytes, then the end"
        data += piece
    return bytes(data)


# -- what is left of a write -----------------------------------------------------------------------


@given(pieces_of_any_kind.filter(lambda pieces: any(map(len, pieces))), st.data())
def test_what_is_left(pieces: list[Any], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    sent = data.draw(st.integers(0, len(whole) - 1))
    before = list(pieces)
    rest = sender.after(pieces, sent)
    assert b"".join(rest) == whole[sent:]
    assert rest[0]
    assert pieces == before
    # None is copied, and of the first no byte.
    assert isinstance(rest[0], memoryview) or any(rest[0] is piece for piece in pieces)
    assert all(any(left is piece for piece in pieces) for left in rest[1:])


@given(pieces_of_any_kind, st.lists(st.integers(1, 50), max_size=100))
def test_all_of_it_however_little_is_taken(pieces: list[Any], takes: list[int]) -> None:
    sock = choosy(*takes)
    one, ready = sender_to(sock)
    ready += pieces
    one.send()
    assert sock.sent == b"".join(pieces)
    assert not ready
    assert not one.sending


@given(
    st.lists(st.tuples(pieces_of_any_kind, st.sampled_from(["now", "wait", "leave"])), max_size=8),
    st.lists(st.integers(0, 50), max_size=60),
)
@settings(max_examples=200)
def test_the_order_whoever_sends(steps: list[tuple[list[Any], str]], takes: list[int]) -> None:
    """Some of it without waiting, the rest later, and what was ready meanwhile after it."""
    sock = choosy()
    one, ready = sender_to(sock)
    expected = bytearray()
    left = iter(takes)
    for pieces, how in steps:
        ready += pieces
        expected += b"".join(pieces)
        if how == "now":
            sock.takes = iter([*left, *[1 << 30] * 100])
            done = one.send_without_waiting()
            left = iter([])
            assert done == (sock.sent == expected and not any(map(len, ready)))
            assert sock.sent + b"".join(ready) == expected
        elif how == "wait":
            sock.takes = iter([1 << 30] * 100)
            one.send()
            assert not ready
    sock.takes = iter([1 << 30] * 100)
    one.send()
    assert sock.sent == expected


def test_many_pieces_are_sent_some_at_a_time() -> None:
    for how in (Sender.send, Sender.send_ready, Sender.send_without_waiting):
        sock = choosy()
        one, ready = sender_to(sock)
        expected = [bytes([n % 251, n // 251]) for n in range(3 * IOV_MAX + 5)]
        ready += expected
        how(one)
        assert sock.sent == b"".join(expected)


# -- a real socket ---------------------------------------------------------------------------------


def test_without_waiting_it_sends_what_the_client_takes(pair: Pair) -> None:
    one, ready = sender_to(pair[0])
    data = [bytes([n]) * (MUCH // 64) for n in range(64)]
    ready += data
    assert not one.send_without_waiting()
    assert not one.send_without_waiting()  # the client has taken nothing meanwhile
    assert not one.sending
    left = sum(map(len, ready))
    assert 0 < left < MUCH
    assert receive(pair[1], MUCH - left) == b"".join(data)[: MUCH - left]
    ready.append(b"the end")
    got: list[bytes] = []
    client = threading.Thread(target=lambda: got.append(receive(pair[1], left + 7)))
    client.start()
    one.send()
    client.join(WAIT)
    assert got == [b"".join(data)[MUCH - left :] + b"the end"]


@pytest.mark.parametrize("how", [Sender.send, Sender.send_without_waiting])
def test_large_replies_are_given_room(pair: Pair, how: Callable[[Sender], object]) -> None:
    """And small ones are not: a client that takes them late gets more of them at a time."""
    one, ready = sender_to(pair[0])
    before = room(pair[0])
    for reply, more in [(LARGE_REPLY - 1, False), (LARGE_REPLY, True), (512, True)]:
        ready += [b"header", bytes(reply)]
        how(one)
        assert receive(pair[1], 6 + reply) == b"header" + bytes(reply)
        assert (room(pair[0]) > before) == more


def test_more_room_is_not_taken_away() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * ROOM)
        before = room(ours)
        one, ready = sender_to(ours)
        ready.append(bytes(LARGE_REPLY))
        one.send()
        assert room(ours) == before


def test_tcp_has_a_window_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "ROOM", 64 << 20)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as theirs,
    ):
        ours, _ = server.accept()
        with ours:
            one, ready = sender_to(ours)
            before = room(ours)
            ready.append(bytes(LARGE_REPLY))
            one.send()
            assert receive(theirs, LARGE_REPLY) == bytes(LARGE_REPLY)
            assert room(ours) == before


def test_who_sends_waits_for_the_client_and_that_can_be_seen(pair: Pair) -> None:
    one, ready = sender_to(pair[0])
    ready += [b"a" * MUCH, b"b"]
    sending = threading.Thread(target=one.send)
    sending.start()
    assert receive(pair[1], 1000)[:1000] == b"a" * 1000
    assert one.sending
    ready.append(b"c")
    assert not one.send_without_waiting()  # another is sending: what is ready is left to it
    one.send_ready()
    assert ready == [b"c"]
    rest = bytearray()
    while rest[-1:] != b"c":
        rest += pair[1].recv(1 << 20)
    assert rest.endswith(b"abc")
    sending.join(WAIT)
    assert not sending.is_alive()
    assert not one.sending


@pytest.mark.parametrize("how", [Sender.send, Sender.send_ready, Sender.send_without_waiting])
def test_a_client_that_has_gone(pair: Pair, how: Callable[[Sender], object]) -> None:
    one, ready = sender_to(pair[0])
    pair[1].close()
    ready.append(b"reply")
    with pytest.raises(BrokenPipeError):
        how(one)
    assert not one.sending  # the next one sees for itself
    ready.append(b"reply")
    with pytest.raises(BrokenPipeError):
        how(one)


def test_a_client_that_goes_while_it_is_sent_to(pair: Pair) -> None:
    one, ready = sender_to(pair[0])
    ready.append(b"a" * MUCH)
    failures: list[BaseException] = []

    def send() -> None:
        try:
            one.send()
        except OSError as failure:
            failures.append(failure)

    sending = threading.Thread(target=send)
    sending.start()
    receive(pair[1], 1000)
    pair[1].close()
    sending.join(WAIT)
    assert [type(failure) for failure in failures] == [BrokenPipeError]
    assert not one.sending


# -- several threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Sender.send, Sender.send_ready])
def test_what_is_left_to_the_one_who_sends_is_sent_by_it(
    how: Callable[[Sender], object],
) -> None:
    sock = choosy()
    one, ready = sender_to(sock)
    late = iter([b"second", b"third"])

    def meanwhile() -> None:
        reply = next(late, None)
        if reply is not None:  # another thread's
            ready.append(reply)
            assert not one.send_without_waiting()
            one.send_ready()

    sock.before = meanwhile
    ready.append(b"first")
    how(one)
    assert sock.sent == b"firstsecondthird"
    assert not ready


def test_who_is_to_wait_waits_for_another_who_sends() -> None:
    """Else a client that takes nothing could have replies pile up here."""
    taking = threading.Event()
    sock = choosy()
    sock.before = lambda: taking.wait(WAIT)
    one, ready = sender_to(sock)
    ready.append(b"first")
    first = threading.Thread(target=one.send)
    first.start()
    while ready:
        pass  # it is about to send
    ready.append(b"second")
    second = threading.Thread(target=one.send)
    second.start()
    second.join(NOT_YET)
    assert second.is_alive()
    taking.set()
    for thread in (first, second):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert sock.sent == b"firstsecond"


def test_what_becomes_ready_while_a_part_is_put_back_comes_after_it() -> None:
    sock = choosy(3)
    one, ready = sender_to(sock)
    sock.before = lambda: ready.append(b"later")
    ready.append(b"sooner")
    assert not one.send_without_waiting()
    sock.before = lambda: None
    one.send()
    assert sock.sent == b"soonerlater"


@pytest.mark.parametrize(
    "hows",
    [
        (Sender.send, Sender.send),
        (Sender.send, Sender.send_ready),
        (Sender.send_ready, Sender.send_ready),
    ],
)
def test_two_threads_send_all_and_nothing_twice(
    pair: Pair, hows: Sequence[Callable[[Sender], object]]
) -> None:
    one, ready = sender_to(pair[0])
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    count, size = 1500, 40

    def work(number: int, how: Callable[[Sender], object]) -> None:
        for n in range(count):
            # A reply's pieces come with one call, so that nobody else's come in between.
            ready.extend((bytes([number]) + n.to_bytes(2, "big"), bytes([number]) * (size - 3)))
            how(one)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(hows)]
    for thread in threads:
        thread.start()
    got = receive(pair[1], 2 * count * size)
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert not ready
    replies = [got[at : at + size] for at in range(0, len(got), size)]
    assert all(reply[3:] == reply[:1] * (size - 3) for reply in replies)
    for number in range(2):
        numbers = [int.from_bytes(r[1:3], "big") for r in replies if r[0] == number]
        assert numbers == list(range(count))
