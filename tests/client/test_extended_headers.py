"""The client's extended headers: on our server, on qemu-nbd's, and byte for byte."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
from pynbdkit.client import Client, connect
from pynbdkit.client.connection import MAX_EXTENT
from pynbdkit.protocol import constants as nbd
from pynbdkit.protocol.errors import ProtocolError
from pynbdkit.protocol.handshake_client import ClientHandshake
from support import next_peer, run

BASE, DIRTY, DEPTH = "base:allocation", "test:dirty", "test:depth"
GIB, EIB = 1 << 30, 1 << 60
Calls = list[tuple[Any, ...]]


class Wide(pynbdkit.Device):
    """4 EiB that are kept nowhere, two contexts of its own, and a note of every call."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def get_size(self) -> int:
        return 4 * EIB

    def pread(self, count: int, offset: int, flags: int = 0) -> bytes:
        return b"x" * count

    def pwrite(self, buf: memoryview, offset: int, flags: int) -> None:
        self.calls.append(("pwrite", bytes(buf), offset))

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("trim", count, offset))

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset))

    def cache(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("cache", count, offset))

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        self.calls.append((BASE, count, offset))
        return [(0, 2 * EIB, 3), (2 * EIB, 2 * EIB, 0)]

    def contexts(self) -> Sequence[str]:
        return (DIRTY, DEPTH)

    def block_status(
        self, context: str, count: int, offset: int, flags: int
    ) -> list[tuple[int, int, int]]:
        self.calls.append((context, count, offset))
        return [(0, EIB, 0), (EIB, 3 * EIB, 1 << 40 if context == DEPTH else 7)]


@pytest.fixture
def calls() -> Calls:
    return []


@pytest.fixture
def server(calls: Calls) -> Iterator[pynbdkit.RunningServer]:
    with pynbdkit.serve(lambda: Wide(calls)) as running:
        yield running


# --- Our own server ------------------------------------------------------------------------------


def test_lengths_of_64_bits_are_one_request(server: pynbdkit.RunningServer, calls: Calls) -> None:
    with connect(server.uri) as client:
        assert client.extended_headers
        client.write(b"hello", 3 * EIB)
        assert client.read(5, 3 * EIB) == b"xxxxx"
        client.zero(3 * EIB, 4096)
        client.trim(3 * EIB, 8192)
        client.cache(3 * EIB, 512)
        assert client.block_status(3 * EIB, EIB) == [(EIB, 3), (2 * EIB, 0)]
        with pytest.raises(OSError) as caught:
            client.trim(2 * EIB, 3 * EIB)
        assert caught.value.errno == errno.EINVAL
    assert calls == [
        ("pwrite", b"hello", 3 * EIB),
        ("zero", 3 * EIB, 4096),
        ("trim", 3 * EIB, 8192),
        ("cache", 3 * EIB, 512),
        (BASE, 3 * EIB, EIB),
    ]


def test_without_extended_headers_nothing_changes(
    server: pynbdkit.RunningServer, calls: Calls
) -> None:
    with connect(server.uri, extended_headers=False) as client:
        assert not client.extended_headers
        assert client.structured_replies
        client.trim(5 * GIB, 4096)
        client.zero(5 * GIB, 4096)
        assert sum(length for length, _ in client.block_status(5 * GIB, 0)) <= 2**32
    rest = 5 * GIB - MAX_EXTENT
    pieces = [(MAX_EXTENT, 4096), (rest, 4096 + MAX_EXTENT)]
    assert calls[:4] == [(name, *piece) for name in ("trim", "zero") for piece in pieces]


def test_several_contexts_at_once(server: pynbdkit.RunningServer, calls: Calls) -> None:
    with connect(server.uri, contexts=[BASE, DIRTY, DEPTH]) as client:
        assert set(client.contexts) == {BASE, DIRTY, DEPTH}
        everything = {
            BASE: [(2 * EIB, 3), (2 * EIB, 0)],
            DIRTY: [(EIB, 0), (3 * EIB, 7)],
            DEPTH: [(EIB, 0), (3 * EIB, 1 << 40)],
        }
        assert client.block_statuses(4 * EIB, 0) == everything
        assert {call[0] for call in calls} == {BASE, DIRTY, DEPTH}
        calls.clear()
        # The filter: the server looks up those that were asked for, and no other.
        found = client.block_statuses(4 * EIB, 0, contexts=[DEPTH, BASE])
        assert found == {name: everything[name] for name in (DEPTH, BASE)}
        assert {call[0] for call in calls} == {BASE, DEPTH}
        calls.clear()
        assert client.block_status(EIB, 0, context=DEPTH, one=True) == [(EIB, 0)]
        assert [call[0] for call in calls] == [DEPTH]
        assert client.block_statuses(0, 0) == {BASE: [], DIRTY: [], DEPTH: []}
        for wanted in (["x:y"], []):
            with pytest.raises(OSError, match="negotiated") as caught:
                client.block_statuses(512, 0, contexts=wanted)
            assert caught.value.errno == errno.ENOTSUP


# --- qemu-nbd ------------------------------------------------------------------------------------


def test_qemu_nbd(sockdir: Path) -> None:
    disk = sockdir / "disk"
    with disk.open("wb") as file:
        file.truncate(6 * GIB)
        file.seek(5 * GIB)
        file.write(b"x" * 65536)
    path = sockdir / "qemu.sock"
    run(next_peer("qemu-nbd"), "--fork", "-A", "-f", "raw", "-k", path, "-e", "2", disk)
    depth = "qemu:allocation-depth"
    with connect(f"nbd+unix:///?socket={path}", contexts=[BASE, depth]) as client:
        assert client.extended_headers
        assert client.flags & nbd.FLAG_BLOCK_STATUS_PAYLOAD
        assert client.block_status(6 * GIB, 0, one=True) == [(5 * GIB, 3)]  # More than 32 bits.
        assert client.block_status(6 * GIB, 0, context=depth)
        assert set(client.block_statuses(6 * GIB, 0)) == {BASE, depth}
        client.zero(6 * GIB, 0)
        assert client.read(65536, 5 * GIB) == bytes(65536)
        client.write(b"hello", 5 * GIB, fua=True)
        assert client.read(7, 5 * GIB - 1) == b"\0hello\0"
        client.trim(6 * GIB, 0)
        client.cache(65536, 5 * GIB)
        client.flush()


# --- Byte for byte -------------------------------------------------------------------------------

REQUEST = struct.Struct(">IHHQQQ")
CONTEXTS = {7: BASE, 9: DIRTY}


def settled(flags: int = 0xFFFF, maximum: int = 2**20) -> tuple[Client, socket.socket]:
    """A client in transmission with extended headers, and the server's end of its connection."""
    handshake = ClientHandshake("", contexts=list(CONTEXTS.values()))
    info = struct.pack(">HQH", 0, 2**62, flags)
    sizes = struct.pack(">HIII", 3, 1, 4096, maximum)
    replied = [(11, 1, b"")]
    replied += [(10, 4, struct.pack(">I", key) + name.encode()) for key, name in CONTEXTS.items()]
    replied += [(10, 1, b""), (7, 3, info), (7, 3, sizes), (7, 1, b"")]
    stream = b"NBDMAGICIHAVEOPT\0\3"
    for option, kind, body in replied:
        stream += struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body
    handshake.receive(stream)
    mine, its = socket.socketpair()
    return Client(mine, handshake), its


def chunk(
    kind: int, body: bytes = b"", *, done: bool = True, cookie: int = 1, at: int = 0
) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, cookie, at, len(body)) + body


def error(number: int, *, cookie: int, at: int) -> bytes:
    return chunk(2**15 + 1, struct.pack(">IH", number, 0), cookie=cookie, at=at)


def status(
    context: int, *extents: tuple[int, int], done: bool = False, cookie: int = 1, at: int = 0
) -> bytes:
    body = struct.pack(">II", context, len(extents))
    body += b"".join(struct.pack(">QQ", *extent) for extent in extents)
    return chunk(6, body, done=done, cookie=cookie, at=at)


Answer = Callable[[int, int, int, int], bytes]


def no_error(kind: int, cookie: int, offset: int, count: int) -> bytes:
    return chunk(0, cookie=cookie, at=offset)


@contextmanager
def recorded(answer: Answer = no_error, flags: int = 0xFFFF) -> Iterator[tuple[Client, Calls]]:
    """A client, and what it sends: (kind, flags, length in the header, offset, payload)."""
    client, its = settled(flags)
    seen: Calls = []

    def serve() -> None:
        with its:
            while header := its.recv(REQUEST.size, socket.MSG_WAITALL):
                magic, flags, kind, cookie, offset, count = REQUEST.unpack(header)
                assert magic == 0x21E41C71
                payload = b""
                if flags & nbd.CMD_FLAG_PAYLOAD_LEN:
                    payload = its.recv(count, socket.MSG_WAITALL)
                seen.append((kind, flags, count, offset, payload))
                if kind == nbd.CMD_DISC:
                    break
                its.sendall(answer(kind, cookie, offset, count))

    thread = threading.Thread(target=serve)
    thread.start()
    with client:
        yield client, seen
    thread.join(30)
    assert not thread.is_alive()


def test_requests_on_the_wire() -> None:
    def answer(kind: int, cookie: int, offset: int, count: int) -> bytes:
        if kind != nbd.CMD_BLOCK_STATUS:
            return no_error(kind, cookie, offset, count)
        first = status(7, (9, 0), cookie=cookie, at=offset)
        second = status(9, (5, 1 << 40), done=True, cookie=cookie, at=offset)
        if count == 12:  # A payload with one ID.
            return status(7, (9, 0), done=True, cookie=cookie, at=offset)
        return first + second

    with recorded(answer) as (client, seen):
        client.write(b"x", 1)
        client.write(b"xy", 2, fua=True)
        client.trim(3 * 2**40, 4, fua=True)
        client.zero(5 * 2**40, 6, no_hole=True)
        client.cache(7 * 2**40, 8)
        client.flush()
        both = client.block_statuses(9 * 2**40, 10)
        assert both == {BASE: [(9, 0)], DIRTY: [(5, 1 << 40)]}
        assert client.block_status(11 * 2**40, 12, one=True) == [(9, 0)]
        assert client.block_statuses(13, 14, contexts=[DIRTY, BASE]) == both
    write, disc, flush, trim, cache, zero, block_status = range(1, 8)
    assert seen == [
        (write, 0b100000, 1, 1, b"x"),
        (write, 0b100001, 2, 2, b"xy"),
        (trim, 0b1, 3 * 2**40, 4, b""),
        (zero, 0b10, 5 * 2**40, 6, b""),
        (cache, 0, 7 * 2**40, 8, b""),
        (flush, 0, 0, 0, b""),
        (block_status, 0, 9 * 2**40, 10, b""),
        (block_status, 0b101000, 12, 12, struct.pack(">QI", 11 * 2**40, 7)),
        (block_status, 0, 13, 14, b""),  # All of them were asked for: no filter.
        (disc, 0, 0, 0, b""),
    ]


def test_no_filter_where_the_server_has_none() -> None:
    def answer(kind: int, cookie: int, offset: int, count: int) -> bytes:
        first = status(9, (5, 1), cookie=cookie, at=offset)
        return first + status(7, (9, 0), done=True, cookie=cookie, at=offset)

    with recorded(answer, 0xFFFF & ~nbd.FLAG_BLOCK_STATUS_PAYLOAD) as (client, seen):
        assert client.block_status(512, 0) == [(9, 0)]
        assert client.block_status(512, 0, context=DIRTY) == [(5, 1)]
    assert seen[0] == (nbd.CMD_BLOCK_STATUS, 0, 512, 0, b"")


@pytest.mark.parametrize("refusal", [nbd.NBD_EINVAL, nbd.NBD_EOVERFLOW])
@pytest.mark.parametrize("kind", [nbd.CMD_WRITE_ZEROES, nbd.CMD_CACHE])
def test_a_server_that_wants_its_maximum_kept_gets_it(kind: int, refusal: int) -> None:
    """It may refuse a zero or cache beyond it ("Block size constraints")."""

    def answer(kind: int, cookie: int, offset: int, count: int) -> bytes:
        if count > 2**20:
            return error(refusal, cookie=cookie, at=offset)
        return no_error(kind, cookie, offset, count)

    with recorded(answer) as (client, seen):
        call = client.zero if kind == nbd.CMD_WRITE_ZEROES else client.cache
        call(2**20 + 512, 0)
        call(2**20, 0)
    assert [item[2:4] for item in seen[:-1]] == [
        (2**20 + 512, 0),
        (2**20, 0),
        (512, 2**20),
        (2**20, 0),
    ]


@pytest.mark.parametrize("number", [nbd.NBD_EIO, nbd.NBD_ENOSPC])
def test_other_errors_of_a_large_zero_are_told(number: int) -> None:
    def answer(kind: int, cookie: int, offset: int, count: int) -> bytes:
        return error(number, cookie=cookie, at=offset)

    with recorded(answer) as (client, seen):
        with pytest.raises(OSError) as caught:
            client.zero(2**40, 0)
        assert caught.value.errno == getattr(errno, nbd.name_of("NBD_E", number)[4:])
    assert len(seen) == 2


@contextmanager
def answered(replies: bytes) -> Iterator[Client]:
    """A client to whom these replies are on their way, and nothing after them."""
    client, its = settled()
    with its, client:
        its.sendall(replies)
        its.shutdown(socket.SHUT_WR)
        yield client


@pytest.mark.parametrize(
    "replies",
    [
        struct.pack(">IIQ", 0x67446698, 0, 1),  # A simple reply.
        struct.pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0) + bytes(12),  # A structured one.
        chunk(0, at=1),  # Of another offset.
        chunk(0, cookie=2),
        status(7, (512, 0), done=True),  # Not what was asked for.
    ],
)
def test_replies_that_do_not_fit(replies: bytes) -> None:
    with answered(replies) as client, pytest.raises(ProtocolError):
        client.flush()


EXTENT = struct.pack(">QQ", 512, 0)


@pytest.mark.parametrize(
    "replies",
    [
        chunk(0),
        status(9, (512, 0), done=True),  # The other one.
        status(7, (512, 0)) + status(9, (512, 0), done=True),  # More than was asked for.
        status(7, (512, 0)) + status(7, (512, 0), done=True),
        status(7, (512, 0), (512, 3), done=True),  # One extent was asked for.
        status(7, (1024, 0), done=True),  # It must not reach further.
        status(7, (0, 0), done=True),
        status(7, done=True),
        chunk(6, struct.pack(">II", 7, 2) + EXTENT),  # One of two.
        chunk(5, struct.pack(">III", 7, 512, 0)),  # In 32 bits.
    ],
)
def test_block_status_that_lies(replies: bytes) -> None:
    with answered(replies) as client, pytest.raises(ProtocolError):
        client.block_status(512, 0, one=True)


def test_a_read_in_chunks() -> None:
    first = chunk(1, struct.pack(">Q", 600) + b"a" * 412, done=False, at=100)
    second = chunk(2, struct.pack(">QI", 100, 500), at=100)
    with answered(first + second) as client:
        assert client.read(912, 100) == bytes(500) + b"a" * 412
