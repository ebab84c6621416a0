"""SecureStream: TLS with a socket's methods, against clients of OpenSSL over a socket."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certificates import Certificates, certificates
from pynbdkit.server.secure import AT_ONCE, LARGE_PIECE, RECORD, SecureStream
from pynbdkit.server.single import Pipes
from pynbdkit.tls import Credentials
from support import program

__all__ = ["certificates"]

LIMIT = 20
"""Seconds after which what should happen at once has failed."""


class Pair:
    """A stream, and the client at its other end."""

    def __init__(self, pki: Certificates, version: ssl.TLSVersion | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(pki["good"] / "ca-cert.pem")
        if version is not None:
            context.maximum_version = version
        self.raw, theirs = socket.socketpair()
        self.stream = SecureStream(self.raw, Credentials(str(pki["good"])).context())
        with Thread(self.stream.handshake):
            self.client = context.wrap_socket(
                theirs, server_hostname="localhost", suppress_ragged_eofs=False
            )
        self.client.settimeout(LIMIT)
        self.raw.settimeout(LIMIT)

    def receive(self, count: int) -> bytes:
        """What the client gets."""
        data = b""
        while len(data) < count:
            piece = self.client.recv(count - len(data))
            assert piece
            data += piece
        return data

    def close(self) -> None:
        self.stream.close()
        self.client.close()


class Thread(threading.Thread):
    """Runs a function while the block does; what it raises is raised at the block's end."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._function()
        except BaseException as failure:
            self.failure = failure

    def __enter__(self) -> Thread:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(LIMIT)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def pair(certificates: Certificates, request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(certificates, request.param)
    assert (
        made.stream.tls.version()
        == {
            ssl.TLSVersion.TLSv1_2: "TLSv1.2",
            ssl.TLSVersion.TLSv1_3: "TLSv1.3",
        }[request.param]
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def long_pair(certificates: Certificates) -> Iterator[Pair]:
    """One for many examples."""
    made = Pair(certificates)
    yield made
    made.close()


# --- Bytes ---------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(0, 100),
    st.sampled_from([4096, RECORD - 1, RECORD, RECORD + 1, LARGE_PIECE - 1, LARGE_PIECE]),
    st.integers(LARGE_PIECE, 3 * LARGE_PIECE),
    st.sampled_from([AT_ONCE - 20, AT_ONCE, 2 * AT_ONCE + 1]),
)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, max_size=12), kinds=st.lists(st.sampled_from("bav"), min_size=12))
def test_what_is_sent_arrives(long_pair: Pair, sizes: list[int], kinds: list[str]) -> None:
    make: dict[str, Callable[[bytes], Any]] = {"b": bytes, "a": bytearray, "v": memoryview}
    data = [os.urandom(size) for size in sizes]
    pieces = [make[kind](piece) for kind, piece in zip(kinds, data, strict=False)]
    sent = []
    with Thread(lambda: sent.append(long_pair.stream.sendmsg(pieces))):
        assert long_pair.receive(sum(sizes)) == b"".join(data)
    assert sent == [sum(sizes)]


@given(sizes=st.lists(SIZES, max_size=12))
def test_records_are_full(long_pair: Pair, sizes: list[int]) -> None:
    """No small record for a header before its data; and no copy of what is large."""
    pieces = [os.urandom(size) for size in sizes]
    records = long_pair.stream._records(pieces)
    assert b"".join(records) == b"".join(pieces)
    for record in records[:-1]:
        assert len(record) % RECORD == 0
    copied = sum(len(record) for record in records if isinstance(record, bytes))
    small = sum(size for size in sizes if size < LARGE_PIECE)
    large = sum(size >= LARGE_PIECE for size in sizes)
    assert copied <= small + large * 2 * RECORD


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(SIZES.filter(bool), min_size=1, max_size=8),
    buffers=st.lists(st.integers(999, 3 * RECORD), min_size=1),
)
def test_what_comes_is_received(long_pair: Pair, sizes: list[int], buffers: list[int]) -> None:
    data = [os.urandom(size) for size in sizes]
    received = b""

    def send() -> None:
        for piece in data:
            long_pair.client.sendall(piece)

    with Thread(send):
        for turn in range(sum(sizes)):
            buffer = bytearray(buffers[turn % len(buffers)])
            received += buffer[: long_pair.stream.recv_into(buffer)]
            if len(received) == sum(sizes):
                break
    assert received == b"".join(data)
    assert not long_pair.stream.pending()


def test_records_that_came_together_are_received_together(pair: Pair) -> None:
    for number in range(50):
        pair.client.sendall(bytes([number]) * 28)
    buffer = bytearray(1 << 16)
    assert pair.stream.recv_into(buffer) == 50 * 28
    assert bytes(buffer[: 50 * 28 : 28]) == bytes(range(50))


def test_exactly_what_was_asked_for_and_all_of_it(pair: Pair) -> None:
    data = os.urandom(300_000)

    def trickle() -> None:
        for start in range(0, len(data), 10_000):
            pair.client.sendall(data[start : start + 10_000])

    buffer = memoryview(bytearray(1 << 20))
    with Thread(trickle):
        assert pair.stream.recv_into(buffer, 299_990, socket.MSG_WAITALL) == 299_990
    assert bytes(buffer[:299_990]) == data[:299_990]
    assert not any(buffer[299_990:])
    assert pair.stream.recv_into(buffer) == 10
    assert buffer[:10] == data[-10:]


def test_pending_tells_of_what_the_descriptor_does_not(pair: Pair) -> None:
    pair.client.sendall(b"first")
    pair.client.sendall(b"second")
    buffer = bytearray(3)
    for expected, more in ((b"fir", True), (b"sts", True), (b"eco", True), (b"nd", False)):
        count = pair.stream.recv_into(buffer)
        assert buffer[:count] == expected
        assert pair.stream.pending() is more


def test_bytes_that_came_before_the_handshake(certificates: Certificates) -> None:
    """A client may send its hello in one piece with what asks for TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates["good"] / "ca-cert.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    ours, theirs = socket.socketpair()
    context = Credentials(str(certificates["good"])).context()
    stream = SecureStream(ours, context, hello[:50])
    with theirs, contextlib.closing(stream), Thread(stream.handshake):
        theirs.sendall(hello[50:])
        incoming.write(theirs.recv(1 << 16))
        client.do_handshake()
        theirs.sendall(outgoing.read())


# --- Two directions, several threads -------------------------------------------------------------


def test_threads_send_and_receive_at_once(pair: Pair) -> None:
    """Echo as a reader and two senders do it; every message comes whole, whatever is between."""
    rounds, size = 150, 5000
    arrived = threading.Semaphore(0)
    wanted = [bytes([number % 256]) * size for number in range(rounds)]

    def read() -> None:
        buffer = memoryview(bytearray(rounds * size))
        for number in range(rounds):
            assert pair.stream.recv_into(buffer, size, socket.MSG_WAITALL) == size
            assert buffer[:size] == wanted[number]
            arrived.release()
            arrived.release()

    def send(mark: bytes) -> None:
        for number in range(rounds):
            assert arrived.acquire(timeout=LIMIT)
            pair.stream.sendmsg([mark, number.to_bytes(2, "big"), wanted[number]])

    got: dict[bytes, list[int]] = {b"a": [], b"b": []}
    with Thread(read), Thread(lambda: send(b"a")), Thread(lambda: send(b"b")):
        for message in wanted:  # the client has one thread: it, too, has an object of OpenSSL
            pair.client.sendall(message)
        while sum(map(len, got.values())) < 2 * rounds:
            head = pair.receive(3)
            number = int.from_bytes(head[1:], "big")
            assert pair.receive(size) == wanted[number]
            got[head[:1]].append(number)
    assert got == {b"a": list(range(rounds)), b"b": list(range(rounds))}


class OneAtATime:
    """A TLS object as it wants to be used; it is slow, so that two threads do meet."""

    def __init__(self, tls: ssl.SSLObject) -> None:
        self._tls = tls
        self._busy = threading.Lock()
        self.met = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tls, name)

        def call(*arguments: Any) -> Any:
            free = self._busy.acquire(blocking=False)
            self.met += not free
            try:
                time.sleep(0.001)
                return method(*arguments)
            finally:
                if free:
                    self._busy.release()

        return call


def test_openssls_object_is_used_by_one_thread_at_a_time(pair: Pair) -> None:
    guard: Any = OneAtATime(pair.stream.tls)
    pair.stream.tls = guard
    rounds = 60

    def read() -> None:
        buffer = bytearray(10)
        for _ in range(rounds):
            assert pair.stream.recv_into(buffer, 10, socket.MSG_WAITALL) == 10

    def send() -> None:
        for _ in range(rounds):
            pair.stream.sendmsg([bytes(10)])

    for _ in range(rounds):
        pair.client.sendall(bytes(10))
    with Thread(read), Thread(send), Thread(send):
        pair.receive(2 * rounds * 10)
    assert guard.met == 0


def test_a_client_that_does_not_read_stops_its_senders_alone(pair: Pair) -> None:
    """While one thread waits to send, another receives: a client's last word gets through."""
    data = bytes(8 << 20)
    sending = Thread(lambda: pair.stream.sendmsg([data]))
    with sending:
        wait_for(lambda: pair.stream._wire.locked() and full(pair.raw))
        pair.client.sendall(b"still here")
        buffer = bytearray(100)
        assert pair.stream.recv_into(buffer) == 10
        assert sending.is_alive()
        assert pair.receive(len(data)) == data


def full(sock: socket.socket) -> bool:
    """Whether the client has to read before more can be sent."""
    import select

    return not select.select([], [sock], [], 0)[1]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextlib.contextmanager
def s_client(certificates: Certificates, *words: str) -> Iterator[tuple[SecureStream, Any]]:
    """A stream to openssl's client, and its process: a line "K" or "R" is a command to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        process: Any = subprocess.Popen(
            [program("openssl"), "s_client", "-connect", where, "-quiet", "-no_ign_eof", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process, contextlib.closing(listener.accept()[0]) as sock:
            sock.settimeout(LIMIT)
            stream = SecureStream(sock, Credentials(str(certificates["good"])).context())
            stream.handshake()
            yield stream, process
            stream.close()


def order(process: Any, command: bytes, answer: bytes) -> None:
    """Have it follow a command, which it has to read by itself."""
    process.stdin.write(command)
    process.stdin.flush()
    while answer not in process.stderr.readline():
        assert process.poll() is None


def test_key_updates(certificates: Certificates) -> None:
    """A client renews its keys, and asks us to: what is sent and received goes on."""
    buffer = bytearray(100)
    with s_client(certificates, "-tls1_3") as (stream, process):
        for command in (b"K\n", b"k\n", b"K\n"):
            order(process, command, b"KEYUPDATE")
            process.stdin.write(b"words\n")
            process.stdin.flush()
            count = stream.recv_into(buffer)
            assert bytes(buffer[:count]) == b"words\n"
            stream.sendmsg([b"<", buffer[:count]])
            assert process.stdout.readline() == b"<words\n"


def test_renegotiation_is_refused(certificates: Certificates) -> None:
    """TLS 1.2 lets a client ask for handshake after handshake, which cost us more than it."""
    with s_client(certificates, "-tls1_2") as (stream, process):
        order(process, b"R\n", b"RENEGOTIATING")
        with contextlib.suppress(OSError):
            assert stream.recv_into(bytearray(100)) == 0
        assert b"no renegotiation" in process.stderr.read()


def test_what_could_not_be_sent_at_once_goes_first(pair: Pair) -> None:
    """The reader sends what it can of what TLS has to say; the next sender takes the rest along."""
    said, data = os.urandom(1 << 20), os.urandom(5000)
    pair.stream.tls.write(said)
    pair.stream._send_what_is_possible()
    assert pair.stream._unsent
    with Thread(lambda: pair.stream.sendmsg([data])):
        assert pair.receive(len(said)) == said
        assert pair.receive(len(data)) == data


def test_a_client_that_makes_tls_talk_and_does_not_listen(certificates: Certificates) -> None:
    """Each demand to renegotiate is refused by an alert, which is not read: memory is bounded."""
    pair = Pair(certificates, ssl.TLSVersion.TLSv1_2)
    stream = pair.stream
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    filler = Thread(lambda: stream.sendmsg([bytes(8 << 20)]))
    filler.start()
    wait_for(lambda: full(pair.raw))
    with stream._lock:
        stream._outgoing.write(bytes(1 << 17))  # as many alerts would
    with pytest.raises(OSError, match="deaf"):
        stream.recv_into(bytearray(10))
    stream.shutdown(socket.SHUT_RDWR)
    filler.join(LIMIT)
    assert isinstance(filler.failure, OSError)
    pair.close()


# --- Ends ----------------------------------------------------------------------------------------


def test_an_end_with_and_without_goodbye(certificates: Certificates) -> None:
    buffer = bytearray(100)
    for goodbye in (True, False):
        pair = Pair(certificates)
        pair.client.sendall(b"last words")
        if goodbye:
            pair.client.settimeout(0)
            with contextlib.suppress(ssl.SSLWantReadError):
                pair.client.unwrap()
            os.write(pair.client.fileno(), b"what comes behind it is nothing")
        else:
            socket.socket.shutdown(pair.client, socket.SHUT_WR)
        assert pair.stream.recv_into(buffer, 50, socket.MSG_WAITALL) == 10
        assert pair.stream.recv_into(buffer) == 0
        assert pair.stream.recv_into(buffer) == 0
        pair.close()


def test_an_end_within_a_record(certificates: Certificates) -> None:
    pair = Pair(certificates)
    os.write(pair.client.fileno(), b"\x17\x03\x03\x01\x00" + bytes(100))
    socket.socket.shutdown(pair.client, socket.SHUT_WR)
    assert pair.stream.recv_into(bytearray(100)) == 0
    pair.close()


def test_a_broken_record_ends_it_after_what_came_before(pair: Pair) -> None:
    pair.client.sendall(b"good")
    os.write(pair.client.fileno(), b"\x17\x03\x03\x00\x40" + bytes(64))
    buffer = bytearray(100)
    assert pair.stream.recv_into(buffer) == 4
    for _ in range(2):
        with pytest.raises(OSError, match="TLS: ") as caught:
            pair.stream.recv_into(buffer)
    assert caught.value.strerror is not None
    assert "\n" not in caught.value.strerror
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        pair.client.recv(1)
    with pytest.raises(OSError, match="TLS"):
        pair.stream.sendmsg([b"more"])


def test_close_says_goodbye(pair: Pair) -> None:
    pair.stream.sendmsg([b"data"])
    pair.stream.close()
    pair.stream.close()
    assert pair.client.recv(100) == b"data"
    assert pair.client.recv(100) == b""  # without goodbye this would raise


def test_close_does_not_wait_for_a_client_that_does_not_read(pair: Pair) -> None:
    pair.raw.settimeout(0)
    with pytest.raises(BlockingIOError):
        pair.stream.sendmsg([bytes(8 << 20)])
    pair.raw.settimeout(None)
    with Thread(pair.stream.close):
        pass


def test_shutdown_wakes_the_reader(pair: Pair) -> None:
    counts = []
    with Thread(lambda: counts.append(pair.stream.recv_into(bytearray(10)))):
        pair.stream.shutdown(socket.SHUT_RD)
    assert counts == [0]
    pair.stream.sendmsg([b"the answer"])
    assert pair.receive(10) == b"the answer"


def test_pipes(certificates: Certificates) -> None:
    """-s with TLS: two pipes in place of a socket, and goodbye in the end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates["good"] / "ca-cert.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    from_us, to_client = os.pipe()
    from_client, to_us = os.pipe()
    pipes: Any = Pipes(from_client, to_client)
    stream = SecureStream(pipes, Credentials(str(certificates["good"])).context())

    def exchange(step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                os.write(to_us, outgoing.read())
                incoming.write(os.read(from_us, 1 << 16))
            finally:
                os.write(to_us, outgoing.read())

    with Thread(stream.handshake):
        exchange(client.do_handshake)
    client.write(b"hello")
    os.write(to_us, outgoing.read())
    buffer = bytearray(10)
    assert stream.recv_into(buffer) == 5
    stream.sendmsg([b"world"])
    assert exchange(lambda: client.read(10)) == b"world"
    stream.close()
    assert exchange(lambda: client.read(10)) == b""
    os.close(from_us)
    os.close(to_us)


def test_the_rest_is_the_sockets(pair: Pair) -> None:
    assert pair.stream.family == socket.AF_UNIX
    assert pair.stream.fileno() == pair.raw.fileno()
    assert pair.stream.getpeername() == pair.raw.getpeername()
    assert len(pair.stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)) == 12
    pair.stream.settimeout(0)
    with pytest.raises(BlockingIOError):
        pair.stream.recv_into(bytearray(1))
