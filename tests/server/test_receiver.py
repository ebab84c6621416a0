"""Receiving: what comes out as requests, and when it looks before it waits.

Over real socket pairs. The clock is ours: each look at it can have the client do something, so that
what comes comes at its moment.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbdkit.protocol.requests import FIRST_BUFFER, RequestParser
from pynbdkit.server import receiver
from pynbdkit.server.receiver import (
    FEW,
    IN_TURN,
    LARGE_PAYLOAD,
    LARGEST_PAYLOAD,
    WORTH_WAITING,
    Disconnect,
    Receiver,
)
from raw import READ, WRITE, Raw

WAIT = 20.0
"""Seconds after which a test gives up: nothing that works takes that long."""
READS = [Raw.request(READ, number, 512 * number, 512) for number in range(1000)]
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(the server's end, the client's end)."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.settimeout(None)
    with ours, theirs:
        yield ours, theirs


class Clock:
    """What the receiver takes for the time. It looks at it as it begins to look, and when a look
    was in vain; so the number of times tells how often it has looked."""

    def __init__(self, found_after: int | None = None) -> None:
        self.begun = 0  # how often looking has begun
        self.looks = 0  # looks in vain, since then
        self.patience = 3
        self.found_after = found_after
        """So many looks in vain, then the client sends; None: when looking has ended."""
        self.send: Callable[[], object] = lambda: None
        self.looking = False

    def __call__(self) -> float:
        if not self.looking:
            self.begun += 1
            self.looks = 0
            self.looking = True
            if self.found_after == 0:
                self._send()
            return 0.0
        self.looks += 1
        if self.looks == self.found_after:
            self._send()
            return 0.0
        if self.looks < self.patience or self.found_after is not None:
            return 0.0
        self._send()
        return 1.0

    def _send(self) -> None:
        self.looking = False
        self.send()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(receiver, "perf_counter", clock)
    monkeypatch.setattr(receiver, "_SEVERAL_CPUS", True)
    return clock


def cookies(requests: list[Any]) -> list[int]:
    return [request[2] for request in requests]


def lone(ours: Receiver, theirs: socket.socket, number: int = 0) -> None:
    """A request that is there before it is asked for."""
    theirs.sendall(READS[number])
    assert cookies(ours.receive()) == [number]


def warm_up(ours: Receiver, theirs: socket.socket) -> None:
    """So many lone requests that the next one is looked for."""
    for number in range(IN_TURN):
        lone(ours, theirs, number)


# -- looking before waiting ------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, FEW + 1))
def test_it_looks_when_few_requests_come_at_a_time(pair: Pair, clock: Clock, count: int) -> None:
    ours = Receiver(pair[0], b"", False)
    for _ in range(IN_TURN):
        assert clock.begun == 0
        pair[1].sendall(b"".join(READS[:count]))
        assert cookies(ours.receive()) == list(range(count))
    for number in range(1, 6):
        lone(ours, pair[1], number)
        assert clock.begun == number
        clock.looking = False  # it was there: no look was in vain


@pytest.mark.parametrize("looks", [0, 1, 2, 50])
def test_what_comes_soon_is_found(pair: Pair, clock: Clock, looks: int) -> None:
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    clock.found_after = looks
    clock.send = lambda: pair[1].sendall(READS[77])
    for number in range(1, 20):
        assert cookies(ours.receive()) == [77]
        assert (clock.begun, clock.looks) == (number, looks)


def test_what_comes_late_is_waited_for_and_looked_for_less_and_less(
    pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_REST", 32)
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    clock.send = lambda: pair[1].sendall(READS[5])
    looked = []
    for number in range(200):
        begun = clock.begun
        if ours._rest:
            lone(ours, pair[1], 6)
        else:
            assert cookies(ours.receive()) == [5]
            assert clock.looks == clock.patience
        if clock.begun > begun:
            looked.append(number)
    rests = [later - earlier - 1 for earlier, later in pairwise(looked)]
    assert rests[:7] == [2, 4, 8, 16, 32, 32, 32]


def test_what_is_found_at_last_makes_it_look_each_time_again(pair: Pair, clock: Clock) -> None:
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    clock.send = lambda: pair[1].sendall(READS[5])
    for _ in range(3):  # in vain
        while ours._rest:
            lone(ours, pair[1])
        ours.receive()
    while ours._rest:
        lone(ours, pair[1])
    clock.found_after = 1
    for number in range(1, 10):
        ours.receive()
        assert clock.begun == 3 + number
    clock.found_after = None
    ours.receive()  # in vain
    lone(ours, pair[1])
    lone(ours, pair[1])
    assert clock.begun == 13  # it rests as after the first time
    lone(ours, pair[1])
    assert clock.begun == 14


def test_it_does_not_look_where_many_requests_come_together(pair: Pair, clock: Clock) -> None:
    ours = Receiver(pair[0], b"", False)
    for _ in range(5):
        for number in range(IN_TURN - 1):
            lone(ours, pair[1], number)
        pair[1].sendall(b"".join(READS[: FEW + 1]))
        assert cookies(ours.receive()) == list(range(FEW + 1))
    assert clock.begun == 0


def test_it_does_not_look_with_one_processor(
    pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client could not send meanwhile."""
    monkeypatch.setattr(receiver, "_SEVERAL_CPUS", False)
    ours = Receiver(pair[0], b"", False)
    for number in range(5 * IN_TURN):
        lone(ours, pair[1], number)
    assert clock.begun == 0


def test_it_does_not_look_at_what_is_no_plain_socket(pair: Pair, clock: Clock) -> None:
    class Other(socket.socket):
        """Has a state of its own between the kernel and us, say."""

    with Other(fileno=pair[0].detach()) as other:
        ours = Receiver(other, b"", False)
        assert not ours.plain
        for number in range(5 * IN_TURN):
            lone(ours, pair[1], number)
    assert clock.begun == 0


def test_while_other_connections_are_busy_it_is_not_looked_for(pair: Pair, clock: Clock) -> None:
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    ours.alone = False
    lone(ours, pair[1])  # looked for, as it was not known then
    clock.looking = False
    for _ in range(5 * IN_TURN):
        lone(ours, pair[1])
    assert clock.begun == 1
    ours.alone = True
    warm_up(ours, pair[1])
    assert clock.begun == 1
    lone(ours, pair[1])
    assert clock.begun == 2


@pytest.mark.parametrize("found", [True, False])
def test_a_client_that_goes_while_it_is_looked_for(pair: Pair, clock: Clock, found: bool) -> None:
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    clock.found_after = 2 if found else None
    clock.send = pair[1].close
    with pytest.raises(Disconnect, match=r"^$"):
        ours.receive()
    assert clock.begun == 1


def test_half_a_request_is_looked_for_as_well(pair: Pair, clock: Clock) -> None:
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    pieces = iter([READS[3][:1], READS[3][1:27], READS[3][27:]])
    clock.found_after = 1
    clock.send = lambda: pair[1].sendall(next(pieces))
    assert cookies(ours.receive()) == [3]
    assert clock.begun == 3


def test_a_client_that_goes_within_a_request(pair: Pair, clock: Clock) -> None:
    ours = Receiver(pair[0], b"", False)
    warm_up(ours, pair[1])
    steps = iter([lambda: pair[1].sendall(READS[4][:5]), pair[1].close])
    clock.found_after = 1
    clock.send = lambda: next(steps)()
    with pytest.raises(Disconnect, match="within a request"):
        ours.receive()


def test_with_the_real_clock_it_looks_for_a_moment_only(pair: Pair) -> None:
    ours = Receiver(pair[0], b"", False)
    ours._polls = True
    warm_up(ours, pair[1])
    done: list[list[int]] = []
    waiting = threading.Thread(target=lambda: done.append(cookies(ours.receive())), daemon=True)
    waiting.start()
    pause = threading.Event()
    for _ in range(int(WAIT / 0.001)):
        if ours._rest:
            break
        pause.wait(0.001)
    assert ours._rest  # it has given up to look
    pair[1].sendall(READS[9])
    waiting.join(WAIT)
    assert done == [[9]]


# -- bytes to requests -----------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_split_gives_the_same_requests(data: st.DataObject) -> None:
    """Also while it looks; and with what came with the handshake's end."""
    kinds = data.draw(st.lists(st.sampled_from([0, 1, 500, 5000, 40000]), min_size=1, max_size=20))
    stream, expected = b"", []
    for cookie, count in enumerate(kinds):
        payload = bytes([cookie]) * count
        kind = WRITE if count else READ
        stream += Raw.request(kind, cookie, 0, count or 512) + payload
        expected.append((0, kind, cookie, 0, count or 512, payload or None))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    cuts = sorted([0, len(stream), *cuts])
    pieces = [stream[a:b] for a, b in pairwise(cuts)]
    first = pieces.pop(0) if data.draw(st.booleans()) else b""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        one = Receiver(ours, first, False)
        one._few = data.draw(st.sampled_from([0, IN_TURN]))
        got: list[Any] = []
        for piece in pieces:
            theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Disconnect, match=r"^$"):
            while True:
                got += [(*r[:5], r[5] and bytes(r[5])) for r in one.receive()]
        assert got == expected


def test_what_came_with_the_handshake_is_served_before_anything_is_received(pair: Pair) -> None:
    ours = Receiver(pair[0], READS[1] + READS[2][:9], False)
    assert cookies(ours.receive()) == [1]
    pair[1].sendall(READS[2][9:])
    assert cookies(ours.receive()) == [2]


def before_receiving(monkeypatch: pytest.MonkeyPatch, call: Callable[[int, int], object]) -> None:
    """Have `call(nbytes, flags)` called before a socket receives."""
    plain = socket.socket.recv_into

    def receive(self: socket.socket, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        call(nbytes, flags)
        return plain(self, buffer, nbytes, flags)

    monkeypatch.setattr(socket.socket, "recv_into", receive, raising=False)


@pytest.mark.parametrize("missing", [WORTH_WAITING, WORTH_WAITING + 1])
def test_the_rest_of_a_large_payload_is_received_in_one_go(
    pair: Pair, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def note(nbytes: int, flags: int) -> None:
        if flags != socket.MSG_DONTWAIT:  # that is for what comes behind it
            calls.append((nbytes, flags))
        if len(calls) == 2 and not sender.ident:
            sender.start()

    payload = (bytes(range(256)) * 100)[: FIRST_BUFFER - 28 + missing]
    whole = Raw.request(WRITE, 1, 0, len(payload)) + payload

    def trickle() -> None:
        for start in range(len(whole) - missing, len(whole), 1000):
            pair[1].sendall(whole[start : start + 1000])

    sender = threading.Thread(target=trickle)
    before_receiving(monkeypatch, note)
    ours = Receiver(pair[0], b"", False)
    pair[1].sendall(whole[: len(whole) - missing])
    (request,) = ours.receive()
    sender.join(WAIT)
    assert bytes(request[5] or b"") == payload
    if missing > WORTH_WAITING:
        assert calls[1:] == [(missing, socket.MSG_WAITALL)]
    else:
        assert all(not flags for _, flags in calls)


# -- what has come behind a large payload ----------------------------------------------------------


def large(cookie: int, count: int = LARGE_PAYLOAD) -> bytes:
    return Raw.request(WRITE, cookie, 0, count) + bytes([cookie]) * count


def storing(ours: Receiver, theirs: socket.socket, behind: bytes, count: int) -> memoryview:
    """The payload of a large write that came with something behind it, as it is to be stored."""
    theirs.sendall(large(1, count) + behind)
    request = ours.receive()[0]
    payload = request[5]
    assert payload is not None
    assert payload == b"\1" * count
    return payload


@pytest.mark.parametrize("behind", [READS[3], READS[3] + READS[4], READS[3][:9], large(9)[:5000]])
def test_it_is_received_before_the_payload_is_stored(pair: Pair, behind: bytes) -> None:
    """At first the buffers are too small for all of it, later they are not."""
    ours = Receiver(pair[0], b"", False)
    for _ in range(4):
        payload = storing(ours, pair[1], behind, LARGE_PAYLOAD)
        with pytest.raises(BlockingIOError):
            pair[0].recv(1, socket.MSG_DONTWAIT)
        assert payload == b"\1" * LARGE_PAYLOAD
        whole = large(9) if behind == large(9)[:5000] else READS[3] + READS[4]
        pair[1].sendall(whole[len(behind) :] + READS[5])
        while cookies(ours.receive())[-1] != 5:
            pass
        lone(ours, pair[1], 6)


def test_the_payload_is_not_where_the_next_goes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes with the end of a payload that was waited for, in buffers that are used again."""

    def send_the_rest(nbytes: int, flags: int) -> None:
        if flags == socket.MSG_WAITALL:
            pair[1].sendall(message[20_000:])

    before_receiving(monkeypatch, send_the_rest)
    ours = Receiver(pair[0], b"", False)
    for number in range(6):
        message = large(number) + large(99, 4096)
        pair[1].sendall(message[:20_000])
        (request,) = ours.receive()
        assert ours.ahead
        assert bytes(request[5] or b"") == bytes([number]) * LARGE_PAYLOAD
        assert cookies(ours.receive()) == [99]


@pytest.mark.parametrize(
    "count", [LARGE_PAYLOAD - 1, LARGE_PAYLOAD, LARGEST_PAYLOAD, LARGEST_PAYLOAD + 1]
)
@pytest.mark.parametrize("alone", [True, False])
def test_it_is_taken_along_where_it_pays(
    pair: Pair, count: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small payload is stored soon, of a large one a socket takes little; and where others are
    busy, they use the time."""
    client = threading.Thread(target=pair[1].sendall, args=(large(1, count) + READS[3],))

    def wait_for_all(nbytes: int, flags: int) -> None:
        if flags == socket.MSG_DONTWAIT:
            client.join(WAIT)

    before_receiving(monkeypatch, wait_for_all)
    ours = Receiver(pair[0], b"", False)
    ours.alone = alone
    client.start()
    (request,) = ours.receive()
    assert bytes(request[5] or b"") == b"\1" * count
    assert ours.ahead == (alone and LARGE_PAYLOAD <= count <= LARGEST_PAYLOAD)
    assert cookies(ours.receive()) == [3]


def test_nothing_behind_it_and_then_something(pair: Pair) -> None:
    ours = Receiver(pair[0], b"", False)
    for _ in range(3):
        storing(ours, pair[1], b"", LARGE_PAYLOAD)
        assert not ours.ahead
        lone(ours, pair[1], 7)


def test_a_payload_lives_until_the_next_is_asked_for(pair: Pair) -> None:
    ours = Receiver(pair[0], b"", False)
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    pair[1].sendall(b"".join(large(cookie) for cookie in range(1, 30)))
    seen = 0
    while seen < 29:
        for request in ours.receive():
            seen += 1
            assert bytes(request[5] or b"") == bytes([seen]) * LARGE_PAYLOAD
    assert ours.receive_what_is_there() == []


def test_behind_a_large_read_nothing_is_taken_along(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no payload; so the next receive would do the same."""

    def never(self: RequestParser) -> None:
        raise AssertionError

    monkeypatch.setattr(RequestParser, "turn_over", never)
    ours = Receiver(pair[0], b"", False)
    pair[1].sendall(Raw.request(READ, 1, 0, LARGE_PAYLOAD))
    assert cookies(ours.receive()) == [1]


def test_no_memory_to_take_it_along(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: RequestParser) -> None:
        raise MemoryError

    monkeypatch.setattr(RequestParser, "turn_over", none)
    ours = Receiver(pair[0], b"", False)
    storing(ours, pair[1], READS[3], LARGE_PAYLOAD)
    assert cookies(ours.receive()) == [3]


@pytest.mark.parametrize("unread", [b"", b"never read"])
def test_a_client_that_goes_behind_it(pair: Pair, unread: bytes) -> None:
    """What has come whole is served; the end is for the next one who receives."""
    ours = Receiver(pair[0], b"", False)
    pair[0].sendall(unread)
    pair[1].sendall(large(1))
    pair[1].close()  # what it has not read makes that an error, which the kernel tells once
    try:
        requests = ours.receive()
    except ConnectionResetError:
        requests = ours.receive()
    assert cookies(requests) == [1]
    with pytest.raises((Disconnect, ConnectionResetError)):
        ours.receive()


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True], ids=["receive", "what is there"])
@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "^$"),
        (READS[1][:1], "within a request"),
        (READS[1][:27], "within a request"),
        (Raw.request(WRITE, 1, 0, 512) + bytes(511), "within a request"),
        (Raw.request(WRITE, 1, 0, 1 << 20) + bytes(40000), "within a request"),
        (b"\xff" * 28, "magic number 0xffffffff"),
    ],
)
def test_why_it_ends(pair: Pair, sent: bytes, why: str, at_once: bool) -> None:
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    pair[1].sendall(sent)
    pair[1].shutdown(socket.SHUT_WR)
    receive = ours.receive_what_is_there if at_once else ours.receive
    with pytest.raises(Disconnect, match=why):
        while True:
            assert not receive()


@pytest.mark.parametrize("at_once", [False, True], ids=["receive", "what is there"])
def test_what_came_before_garbage_is_served(pair: Pair, at_once: bool) -> None:
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    receive = ours.receive_what_is_there if at_once else ours.receive
    pair[1].sendall(READS[1] + READS[2] + b"\xff" * 28 + READS[3])
    assert cookies(receive()) == [1, 2]
    with pytest.raises(Disconnect, match="magic"):
        receive()


def test_garbage_is_noticed_as_it_comes(pair: Pair) -> None:
    """And not when something else comes."""
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    pair[1].sendall(b"\xff" * 28)
    with pytest.raises(Disconnect, match="magic"):
        ours.receive_what_is_there()


@pytest.mark.parametrize("at_once", [False, True], ids=["receive", "what is there"])
def test_nothing_is_received_any_more_when_it_is_to_stop(pair: Pair, at_once: bool) -> None:
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    pair[1].sendall(READS[1])
    ours.stopping = True
    with pytest.raises(Disconnect, match=r"^$"):
        (ours.receive_what_is_there if at_once else ours.receive)()
    assert pair[0].recv(100) == READS[1]


def test_a_stop_wakes_who_waits(pair: Pair) -> None:
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    ends: list[str] = []

    def wait() -> None:
        try:
            ours.receive()
        except Disconnect as end:
            ends.append(str(end))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    ours.stopping = True
    pair[0].shutdown(socket.SHUT_RD)
    waiting.join(WAIT)
    assert ends == [""]


def test_the_sockets_own_errors_come_out(pair: Pair) -> None:
    ours = Receiver(pair[0], b"", False)
    pair[0].sendall(b"not read")
    pair[1].close()
    with pytest.raises(ConnectionResetError):
        ours.receive()


# -- without waiting -------------------------------------------------------------------------------


def test_what_is_there(pair: Pair) -> None:
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    assert ours.receive_what_is_there() == []
    for piece, found in [
        (READS[1] + READS[2] + READS[3][:7], [1, 2]),
        (READS[3][7:27], []),
        (READS[3][27:], [3]),
    ]:
        pair[1].sendall(piece)
        assert cookies(ours.receive_what_is_there()) == found
    assert ours.receive_what_is_there() == []


@pytest.mark.parametrize("count", [WORTH_WAITING, WORTH_WAITING + 1])
def test_how_much_is_still_to_come(pair: Pair, count: int) -> None:
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    pair[1].sendall(Raw.request(WRITE, 1, 0, count))
    assert ours.receive_what_is_there() == []
    assert ours.parser.missing == count
    pair[1].sendall(bytes(count))
    while not (requests := ours.receive_what_is_there()):
        pass
    assert cookies(requests) == [1]
    assert not ours.parser.missing


# -- silence ---------------------------------------------------------------------------------------


def limit(sock: socket.socket) -> tuple[int, int]:
    """After how much silence receiving ends: (seconds, microseconds)."""
    value = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, receiver.TIMEVAL.size)
    assert isinstance(value, bytes)
    seconds, microseconds = receiver.TIMEVAL.unpack(value)
    return seconds, microseconds


def test_after_a_silence_the_large_buffer_is_given_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And half a request that is there stays."""
    monkeypatch.setattr(receiver, "LONG_SILENCE", 0.02)
    silent = threading.Event()
    shrink = RequestParser.shrink

    def note(self: RequestParser) -> None:
        shrink(self)
        silent.set()

    monkeypatch.setattr(RequestParser, "shrink", note)
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    assert limit(pair[0]) == (0, 0)  # a small one is no matter
    payload = bytes(100_000)
    pair[1].sendall(Raw.request(WRITE, 1, 0, len(payload)) + payload + READS[7][:9])
    assert cookies(ours.receive()) == [1]
    assert ours.parser.large
    done: list[list[int]] = []
    waiting = threading.Thread(target=lambda: done.append(cookies(ours.receive())), daemon=True)
    waiting.start()
    assert silent.wait(WAIT)
    pair[1].sendall(READS[7][9:])
    waiting.join(WAIT)
    assert done == [[7]]
    assert not ours.parser.large
    lone(ours, pair[1])
    assert limit(pair[0]) == (0, 0)
    assert len(ours.parser.space()) == FIRST_BUFFER


def test_the_limit_of_silence(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "LONG_SILENCE", 90.25)
    ours = Receiver(pair[0], b"", False)
    lone(ours, pair[1])
    pair[1].sendall(Raw.request(WRITE, 1, 0, 100_000) + bytes(100_000) + READS[2])
    while cookies(ours.receive())[-1] != 2:
        pass
    lone(ours, pair[1])
    seconds, microseconds = limit(pair[0])
    assert 90.25 <= seconds + microseconds / 1e6 < 90.3  # the kernel counts in ticks
