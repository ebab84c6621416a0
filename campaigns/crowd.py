"""Many clients in one process, on raw sockets: they work, idle, stall and leave as they like.

No NBD library is used, so that a client can stop in the middle of anything, and so that one process
can be a thousand clients without being what is measured: the clients that work wait in one epoll.
"""

from __future__ import annotations

import gc
import heapq
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

Address = str | tuple[str, int]
"""A Unix socket's path, or host and port."""

PATIENCE = 20.0
"""Seconds that a server may take for an answer that is due at once."""
BLOCK = 4096
"""Bytes that the clients that work read at a time."""
GREETING = 18
READ, WRITE, DISC = range(3)
OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_GO = 2, 3, 5, 7
REP_ACK = 1
CLIENT_FLAGS = struct.pack(">I", 3)
LINGER_NOT = struct.pack("ii", 1, 0)
LONG_NAME = 4000
"""Bytes of an export's name that has room to stop within."""


def option(kind: int, data: bytes = b"") -> bytes:
    """An option as the client sends it."""
    return b"IHAVEOPT" + struct.pack(">II", kind, len(data)) + data


GO = option(OPT_GO, struct.pack(">IH", 0, 0))
"""The default export, please."""


def request(kind: int, cookie: int = 1, offset: int = 0, count: int = 0) -> bytes:
    """The 28 bytes of a request."""
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, count)


def connect(address: Address) -> socket.socket:
    """Connect; nothing has been sent or read."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.settimeout(PATIENCE)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def receive(sock: socket.socket, count: int) -> bytes:
    """So many bytes. Raises EOFError where the server has closed the connection before."""
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError(f"the server closed the connection after {len(data)} of {count} bytes")
        data += piece
    return bytes(data)


def _until_ack(sock: socket.socket) -> None:
    """Read the replies of one option. Raises RuntimeError where it is refused."""
    while True:
        _, _, kind, length = struct.unpack(">QIII", receive(sock, 20))
        text = receive(sock, length)
        if kind == REP_ACK:
            return
        if kind >> 31:
            raise RuntimeError(f"the server refuses an option: {kind:#x} {text.decode()}")


# -- states to stop in -----------------------------------------------------------------------------


def _greeted(sock: socket.socket) -> None:
    receive(sock, GREETING)


def _flags_sent(sock: socket.socket) -> None:
    _greeted(sock)
    sock.sendall(CLIENT_FLAGS)


def _listed(sock: socket.socket) -> None:
    _flags_sent(sock)
    sock.sendall(option(OPT_LIST))
    _until_ack(sock)


def _tls_asked(sock: socket.socket) -> None:
    _flags_sent(sock)
    sock.sendall(option(OPT_STARTTLS))
    _until_ack(sock)


def go(sock: socket.socket) -> None:
    """The whole handshake, to the transmission phase."""
    _flags_sent(sock)
    sock.sendall(GO)
    _until_ack(sock)


def _answered(sock: socket.socket) -> None:
    go(sock)
    sock.sendall(request(READ, count=BLOCK))
    receive(sock, 16 + BLOCK)


def _secured(sock: socket.socket) -> socket.socket:
    """Past the TLS handshake; the server's certificate is not what is looked at here."""
    _tls_asked(sock)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)


def _go_secured(sock: socket.socket) -> socket.socket:
    sock = _secured(sock)
    sock.sendall(GO)
    _until_ack(sock)
    return sock


@dataclass(frozen=True)
class State:
    """Where a client stops: `before` brings it there, then it sends `last`.

    `before` may return another socket to go on with (one with TLS). `farewell` is the orderly end
    that is possible from there; b"" where there is none.
    """

    name: str
    before: Callable[[socket.socket], socket.socket | None]
    last: bytes = b""
    farewell: bytes = b""

    def enter(self, address: Address) -> socket.socket:
        """A new client that has come so far."""
        sock = connect(address)
        try:
            sock = self.before(sock) or sock
            sock.sendall(self.last)
        except BaseException:
            sock.close()
            raise
        return sock


IDLE = State("served, and idle", go, farewell=request(DISC))
USED = State("idle after a read", _answered, farewell=request(DISC))
NEGOTIATION = (
    State("connected, nothing read", lambda _: None),
    State("no client flags", _greeted),
    State("half of the client flags", _greeted, CLIENT_FLAGS[:2]),
    State("no option", _flags_sent, farewell=option(OPT_ABORT)),
    State("half an option's header", _flags_sent, GO[:8]),
    State("half an option's payload", _flags_sent, option(OPT_GO, bytes(LONG_NAME))[:100]),
    State("an option answered, no next one", _listed, farewell=option(OPT_ABORT)),
)
HELLO = bytes.fromhex("16 0301 0200 01 0001fc 0303")
"""How a ClientHello of 512 bytes begins."""
TLS = (
    State("after STARTTLS, nothing sent", _tls_asked),
    State("after STARTTLS, half a ClientHello", _tls_asked, HELLO),
    State("with TLS, no option", _secured, farewell=option(OPT_ABORT)),
)
IDLE_TLS = State("served with TLS, and idle", _go_secured, farewell=request(DISC))
UNREAD = b"".join(request(READ, cookie, 0, 1 << 16) for cookie in range(32))
"""2 MiB of replies: more than any socket takes that nobody reads."""
TRANSMISSION = (
    IDLE,
    State("half a request's header", go, request(READ, count=BLOCK)[:14]),
    State("half a write's payload", go, request(WRITE, count=1 << 16) + bytes(1 << 15)),
    State("replies not read", go, UNREAD, farewell=request(DISC)),
)


def reset(sock: socket.socket) -> None:
    """Close at once: over TCP the server gets a reset, whatever was on its way."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    sock.close()


def leave(sock: socket.socket, farewell: bytes) -> None:
    """Say goodbye and close."""
    with suppress(OSError):  # the server may have been quicker
        sock.sendall(farewell)
    sock.close()


def visits(states: Sequence[State]) -> Iterator[tuple[State, str]]:
    """Every state with every way to leave it, over and over."""
    ways = [(state, "goodbye") for state in states if state.farewell]
    ways += [(state, how) for state in states for how in ("close", "reset")]
    while True:
        yield from ways


def churn(address: Address, states: Sequence[State], count: int) -> None:
    """So many clients after each other, each to its state, and gone."""
    for _, (state, how) in zip(range(count), visits(states), strict=False):
        sock = state.enter(address)
        if how == "goodbye":
            leave(sock, state.farewell)
        elif how == "reset":
            reset(sock)
        else:
            sock.close()


@contextmanager
def crowd(address: Address, state: State, count: int) -> Iterator[list[socket.socket]]:
    """So many clients at once that have come to `state`, and stay there."""
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            socks.append(state.enter(address))
        yield socks
    finally:
        for sock in socks:
            sock.close()


# -- clients that work -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Seconds from request to reply, and how many replies there were a second."""

    median: float
    p99: float
    worst: float
    rate: float

    @classmethod
    def of(cls, seconds: list[float], duration: float) -> Latency:
        """What the single ones come to."""
        if not seconds:
            raise ValueError("not one request was answered")
        seconds.sort()
        last = len(seconds) - 1
        p99 = seconds[min(last, len(seconds) * 99 // 100)]
        return cls(seconds[len(seconds) // 2], p99, seconds[last], len(seconds) / duration)

    def __str__(self) -> str:
        times = " / ".join(f"{each * 1e3:.2f}" for each in (self.median, self.p99, self.worst))
        return f"{times} ms"


class Workers:
    """Clients of which each reads one block at a time, all of them in one epoll."""

    def __init__(self, address: Address, count: int, size: int = 1 << 20) -> None:
        """`size` of the export in bytes: the blocks are spread over it."""
        self._socks: list[socket.socket] = []
        self._epoll = select.epoll()
        self._buffer = bytearray(16 + BLOCK)
        try:
            for _ in range(count):
                sock = connect(address)
                self._socks.append(sock)
                go(sock)
                self._epoll.register(sock, select.EPOLLIN)
        except BaseException:
            self.close()
            raise
        self._requests = [
            request(READ, number, number * BLOCK % size, BLOCK) for number in range(count)
        ]

    def work(self, seconds: float, pause: float = 0.0) -> Latency:
        """Read for so long; `pause`: from one request of a client to its next one (0: none).

        A reply that comes later than the next request is due is counted in that one's time, too:
        clients that are held up must not look quick because they could ask less often.
        """
        taken: list[float] = []
        clock = time.perf_counter
        begin = clock()
        due = [(begin + pause * n / len(self._socks), n) for n in range(len(self._socks))]
        heapq.heapify(due)
        by_fd = {sock.fileno(): number for number, sock in enumerate(self._socks)}
        asked = [0.0] * len(self._socks)
        missing = [0] * len(self._socks)
        planned = [when for when, _ in sorted(due, key=lambda item: item[1])]
        waiting = 0
        end = begin + seconds
        gc_was = gc.isenabled()
        gc.disable()
        try:
            while True:
                now = clock()
                while due and due[0][0] <= now < end:
                    _, number = heapq.heappop(due)
                    self._socks[number].send(self._requests[number])
                    late = planned[number] < asked[number]  # it was due before the last reply
                    asked[number] = planned[number] if late else now
                    missing[number] = 16 + BLOCK
                    waiting += 1
                    now = clock()
                if now >= end and not waiting:
                    break
                if now > end + PATIENCE:
                    raise TimeoutError(f"{waiting} requests are not answered")
                limit = (due[0][0] - now) if due and now < end else PATIENCE
                for fd, _ in self._epoll.poll(max(limit, 0)):
                    number = by_fd[fd]
                    got = self._socks[number].recv_into(self._buffer, missing[number])
                    if not got:
                        raise EOFError("the server has closed a connection that works")
                    missing[number] -= got
                    if missing[number]:
                        continue
                    now = clock()
                    taken.append(now - asked[number])
                    waiting -= 1
                    planned[number] = planned[number] + pause if pause else now
                    asked[number] = now
                    heapq.heappush(due, (planned[number], number))
        finally:
            if gc_was:
                gc.enable()
        return Latency.of(taken, clock() - begin)

    def close(self) -> None:
        """Leave, with a goodbye."""
        for sock in self._socks:
            leave(sock, request(DISC))
        self._socks.clear()
        self._epoll.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- waiting for the server's word -----------------------------------------------------------------


def ends(
    socks: Sequence[socket.socket], patience: float, drip: bytes = b"", every: float = 1.0
) -> list[float]:
    """When the server has closed each connection: seconds from now, one for each of `socks`.

    `drip`: what the clients send meanwhile, one byte at a time, `every` so many seconds. Raises
    TimeoutError when some are still open after `patience` seconds.
    """
    begin = time.monotonic()
    found: dict[int, float] = {}
    left = {sock.fileno(): sock for sock in socks}
    place, next_drip = 0, begin + every
    with select.epoll() as epoll:
        for sock in socks:
            sock.setblocking(False)
            epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP)
        while left:
            now = time.monotonic()
            if now - begin > patience:
                raise TimeoutError(f"{len(left)} of {len(socks)} clients are still connected")
            if drip and now >= next_drip:
                for sock in left.values():
                    with suppress(OSError):
                        sock.send(drip[place : place + 1])
                place, next_drip = place + 1, next_drip + every
            until = min(begin + patience, next_drip if drip else begin + patience)
            for fd, _ in epoll.poll(max(until - now, 0) + 0.001):
                try:
                    if left[fd].recv(1 << 16):
                        continue
                except (BlockingIOError, ssl.SSLWantReadError):
                    continue
                except OSError:
                    pass
                found[fd] = time.monotonic() - begin
                epoll.unregister(fd)
                del left[fd]
    return [found[sock.fileno()] for sock in socks]


def descriptor_limit(wanted: int) -> None:
    """Let this process have so many descriptors. Raises RuntimeError where it may not."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    if hard < wanted:
        raise RuntimeError(f"{wanted} descriptors are needed, the limit is {hard}: see ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
