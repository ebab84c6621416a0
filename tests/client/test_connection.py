"""The client against nbdkit, and against servers made of bytes where nbdkit behaves too well."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pynbdkit.client import Client, connect
from pynbdkit.protocol import constants as nbd
from pynbdkit.protocol.errors import HandshakeError, ProtocolError
from pynbdkit.protocol.handshake_client import ClientHandshake
from support import ServerProcess, program, run

Nbdkit = Callable[..., ServerProcess]
SPARSE = [(65536, 3), (4096, 0), (1048576 - 65536 - 4096, 3)]


@pytest.mark.parametrize("structured", [True, False])
def test_every_command(nbdkit: Nbdkit, structured: bool) -> None:
    with connect(nbdkit("memory", "1M").uri, structured_replies=structured) as client:
        assert client.size == 1024**2
        assert client.structured_replies is structured
        assert client.read(1024**2, 0) == bytes(1024**2)
        client.write(b"hello", 513)
        client.write(memoryview(b"world"), 1000, fua=True)
        assert client.read(492, 513) == b"hello" + bytes(482) + b"world"
        client.zero(5, 513)
        client.zero(5, 1000, fua=True, no_hole=True, fast=True)
        assert client.read(1024**2, 0) == bytes(1024**2)
        client.write(b"x" * 65536, 65536)
        client.trim(65536, 65536, fua=True)
        assert client.read(65536, 65536) == bytes(65536)
        client.cache(4096, 0)
        client.flush()
        assert client.read(0, 0) == b""
        client.write(b"", 0)


def test_block_status(nbdkit: Nbdkit, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(1024**2)
        file.seek(65536)
        file.write(b"x" * 4096)
    with connect(nbdkit("file", disk).uri) as client:
        assert client.contexts == ("base:allocation",)
        assert client.block_status(1024**2, 0) == SPARSE
        assert client.block_status(1024**2, 0, one=True) == SPARSE[:1]
        assert client.block_status(512, 65536 + 512, one=True) == [(512, 0)]
        assert client.block_status(0, 0) == []
        with pytest.raises(OSError, match="x-none:x") as caught:
            client.block_status(512, 0, context="x-none:x")
        assert caught.value.errno == errno.ENOTSUP


def test_contexts_that_the_server_has_not(nbdkit: Nbdkit) -> None:
    server = nbdkit("memory", "1M")
    with connect(server.uri, contexts=["x-none:x"]) as client:
        assert client.contexts == ()
    with connect(server.uri, structured_replies=False) as client:
        assert client.contexts == ()


@pytest.mark.parametrize("name", ["EIO", "EPERM", "ENOSPC", "ESHUTDOWN"])
@pytest.mark.parametrize("structured", [True, False])
def test_an_error_of_the_server_is_an_oserror(nbdkit: Nbdkit, structured: bool, name: str) -> None:
    server = nbdkit("--filter=error", "memory", "1M", f"error={name}", "error-pwrite-rate=1")
    with connect(server.uri, structured_replies=structured) as client:
        with pytest.raises(OSError) as caught:
            client.write(b"x", 0)
        assert caught.value.errno == getattr(errno, name)
        assert client.read(512, 0) == bytes(512)  # The connection goes on.


def test_what_the_server_does_not_offer_is_not_sent(nbdkit: Nbdkit) -> None:
    server = nbdkit("eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero")
    with connect(server.uri) as client:
        assert client.flags & nbd.FLAG_READ_ONLY
        for call in (
            client.flush,
            lambda: client.trim(512, 0),
            lambda: client.zero(512, 0),
            lambda: client.cache(512, 0),
            lambda: client.write(b"x", 0, fua=True),
        ):
            with pytest.raises(OSError, match="does not offer") as caught:
                call()
            assert caught.value.errno == errno.ENOTSUP
        assert client.read(512, 0) == bytes(512)


def test_large_calls_are_cut(nbdkit: Nbdkit, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = nbdkit("--filter=log", "memory", "8G", f"logfile={log}")
    with connect(server.uri) as client:
        data = bytes(range(256)) * (35 * 4096)
        client.write(data, 1)
        assert client.read(len(data), 1) == data
        client.trim(5 * 1024**3, 4096)
    lines = [line.split(" ...")[0] for line in log.read_text().splitlines()]
    counts = {
        word: [line.split("count=")[1].split()[0] for line in lines if f" {word} id" in line]
        for word in ("Write", "Read", "Trim")
    }
    pieces = [hex(32 * 1024**2), hex(3 * 1024**2)]
    assert counts["Write"] == counts["Read"] == pieces
    assert counts["Trim"] == [hex(2**32 - 65536), hex(1024**3 + 65536)]


def test_the_servers_maximum_is_kept(nbdkit: Nbdkit, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = nbdkit(
        *("--filter=log", "--filter=blocksize-policy", "memory", "1M", f"logfile={log}"),
        *("blocksize-minimum=512", "blocksize-maximum=64K"),
        "blocksize-error-policy=error",
    )
    with connect(server.uri) as client:
        assert client.block_size == (512, 4096, 65536)
        client.write(b"x" * 262144, 0)
        assert client.read(262144, 0) == b"x" * 262144
        client.zero(262144, 0)
        client.cache(262144, 0)
        with pytest.raises(OSError) as caught:
            client.read(1, 0)
        assert caught.value.errno == errno.EINVAL
    lines = log.read_text().splitlines()
    for word in ("Write", "Read", "Zero", "Cache"):
        assert len([line for line in lines if f" {word} id" in line and "0x10000 " in line]) == 4


def test_exports(nbdkit: Nbdkit, tmp_path: Path) -> None:
    (tmp_path / "größe").write_bytes(b"x" * 1024)
    server = nbdkit("file", f"dir={tmp_path}")
    with connect(server.export_uri("gr%C3%B6%C3%9Fe")) as client:
        assert client.export.name == "größe"
        assert client.read(1024, 0) == b"x" * 1024
    with pytest.raises(HandshakeError, match="'nope'") as caught:
        connect(server.export_uri("nope"))
    assert caught.value.code == nbd.REP_ERR_UNKNOWN


@pytest.mark.parametrize(
    ("option", "protocol"),
    [
        ("--no-sr", "newstyle-fixed"),
        ("--mask-handshake=0", "newstyle"),
        ("--mask-handshake=1", "newstyle-fixed"),
        ("--mask-handshake=2", "newstyle"),
        ("-o", "oldstyle"),
    ],
)
def test_servers_that_know_less(nbdkit: Nbdkit, option: str, protocol: str) -> None:
    with connect(nbdkit(option, "memory", "1M").uri) as client:
        assert client.protocol == protocol
        assert client.structured_replies is (option == "--mask-handshake=1")
        client.write(b"hello", 512, fua=option != "-o")  # nbdkit -o offers FUA and refuses it.
        assert client.read(5, 512) == b"hello"


def test_qemu_nbd(sockdir: Path) -> None:
    disk = sockdir / "disk"
    disk.write_bytes(b"\0" * 65536 + b"x" * 65536)
    path = sockdir / "qemu.sock"
    run("qemu-nbd", "--fork", "-f", "raw", "-k", path, "-x", "disk", "-D", "about", disk)
    with connect(f"nbd+unix:///disk?socket={path}") as client:
        assert client.size == 131072
        assert client.export.description == "about"
        assert client.block_size is not None
        assert client.read(131072, 0) == disk.read_bytes()
        client.zero(65536, 65536)
        client.flush()
        assert client.read(65536, 65536) == bytes(65536)


def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # nbdkit takes over the listening socket as socket activation has it: on descriptor 3.
        command = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" -f memory 1M'
        server = subprocess.Popen(["sh", "-c", command, program("nbdkit")], stdin=listener.fileno())
        try:
            with connect(f"nbd://127.0.0.1:{port}/") as client:
                client.write(b"x", 5)
                assert client.read(3, 4) == b"\0x\0"
        finally:
            server.terminate()
            server.wait()


def test_close_tells_the_server(nbdkit: Nbdkit, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = nbdkit("--filter=log", "memory", "1M", f"logfile={log}")
    client = connect(server.uri)
    client.close()
    client.close()
    with pytest.raises(ConnectionError):
        client.read(1, 0)
    assert server.stop() == 0
    assert "memory[2]" not in server.log()  # No complaint about this, its second connection.
    assert "Disconnect" in log.read_text()


@pytest.mark.parametrize(("count", "offset"), [(-1, 0), (1, -1)])
def test_negative_numbers(nbdkit: Nbdkit, count: int, offset: int) -> None:
    with connect(nbdkit("memory", "1M").uri) as client, pytest.raises(ValueError, match="negative"):
        client.read(count, offset)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(f"nbd+unix:///?socket={tmp_path}/none")


# --- Servers made of bytes -----------------------------------------------------------------------

Play = Callable[[bytes, bytes], str]
"""play(head, tail): a URI whose server sends ``head``, and ``tail`` when the client has asked."""


@pytest.fixture
def play(sockdir: Path) -> Iterator[Play]:
    path = sockdir / "script.sock"
    threads = []

    def start(head: bytes, tail: bytes) -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener:
                connected, _ = listener.accept()
            with connected:
                connected.sendall(head)
                try:
                    # Oldstyle, or refused: the next that comes is the client's first request.
                    if tail and connected.recv(28, socket.MSG_WAITALL):
                        connected.sendall(tail)
                        connected.shutdown(socket.SHUT_WR)
                    while connected.recv(65536):
                        pass
                except ConnectionError:
                    pass

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"nbd+unix:///?socket={path}"

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


OLDSTYLE = b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, 4096, 0b111) + bytes(124)


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


@pytest.mark.parametrize(
    ("tail", "error"),
    [
        (simple(cookie=2), ProtocolError),
        (simple() + bytes(4096) + simple(), ProtocolError),
        (bytes(16), ProtocolError),
        (struct.pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0), ProtocolError),
        (simple() + bytes(4095), ConnectionError),
        (simple()[:7], ConnectionError),
    ],
)
def test_a_reply_that_lies_closes_the_connection(
    play: Play, tail: bytes, error: type[Exception]
) -> None:
    client = connect(play(OLDSTYLE, tail))
    with pytest.raises(error):
        client.read(4096, 0)
    with pytest.raises(ConnectionError, match="connection is closed"):
        client.read(4096, 0)
    client.close()


def test_unknown_error_numbers_are_einval(play: Play) -> None:
    with connect(play(OLDSTYLE, simple(error=77))) as client, pytest.raises(OSError) as caught:
        client.flush()
    assert caught.value.errno == errno.EINVAL


def test_early_bytes_are_not_lost(play: Play) -> None:
    # The reply to the first request, before it is sent: wrong, but it must not be dropped.
    with connect(play(OLDSTYLE + simple(), b"")) as client:
        client.flush()


def test_a_server_without_a_word(play: Play) -> None:
    with pytest.raises(TimeoutError):
        connect(play(b"", b""), timeout=0.05)


def test_a_server_of_another_kind(play: Play) -> None:
    with pytest.raises(ProtocolError, match="does not speak NBD"):
        connect(play(b"220 ready\r\n", b""))


# --- Replies that come in chunks ---------------------------------------------------------------


def chunk(kind: int, body: bytes, done: bool = False, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(body)) + body


def data(offset: int, content: bytes, done: bool = False) -> bytes:
    return chunk(1, struct.pack(">Q", offset) + content, done)


def hole(offset: int, length: int, done: bool = False) -> bytes:
    return chunk(2, struct.pack(">QI", offset, length), done)


NONE = chunk(0, b"", True)


def settled(flags: int = 1) -> tuple[Client, socket.socket]:
    """A client in transmission with structured replies, and the server's end of its connection."""
    handshake = ClientHandshake("", extended_headers=False)
    info = struct.pack(">HQH", 0, 4096, flags)
    replied = [(8, 1, b""), (10, 4, b"\0\0\0\7base:allocation"), (10, 1, b""), (7, 3, info)]
    stream = b"NBDMAGICIHAVEOPT\0\3"
    for option, kind, body in [*replied, (7, 1, b"")]:
        stream += struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body
    handshake.receive(stream)
    mine, its = socket.socketpair()
    return Client(mine, handshake), its


@contextmanager
def structured_client(replies: bytes) -> Iterator[Client]:
    """A client to whom these replies are on their way, and nothing after them."""
    client, its = settled()
    with its, client:
        its.sendall(replies)
        its.shutdown(socket.SHUT_WR)
        yield client


def test_requests_on_the_wire() -> None:
    client, its = settled(flags=0xFFFF)
    requests: list[tuple[int, ...]] = []
    magics = set()

    def serve() -> None:
        with its:
            while header := its.recv(28, socket.MSG_WAITALL):
                magic, flags, kind, cookie, offset, count = struct.unpack(">IHHQQI", header)
                magics.add(magic)
                requests.append((kind, flags, count, offset))
                if kind == 2:
                    break
                if kind == 1:
                    its.recv(count, socket.MSG_WAITALL)
                last = status(7, (9, 0), done=True, cookie=cookie)
                its.sendall(last if kind == 7 else simple(cookie=cookie))

    thread = threading.Thread(target=serve)
    thread.start()
    with client:
        client.write(b"x", 1)
        client.write(b"xy", 2, fua=True)
        client.trim(3, 4, fua=True)
        client.zero(5, 6)
        client.zero(7, 8, fua=True, no_hole=True, fast=True)
        client.cache(9, 10)
        client.flush()
        client.block_status(11, 12, one=True)
    thread.join(30)
    write, disc, flush, trim, cache, zero, block_status = range(1, 8)
    assert requests == [
        (write, 0, 1, 1),
        (write, 0b1, 2, 2),
        (trim, 0b1, 3, 4),
        (zero, 0, 5, 6),
        (zero, 0b10011, 7, 8),
        (cache, 0, 9, 10),
        (flush, 0, 0, 0),
        (block_status, 0b1000, 11, 12),
        (disc, 0, 0, 0),
    ]
    assert magics == {0x25609513}


@pytest.mark.parametrize(
    "replies",
    [
        data(512, b"a" * 512 + b"\0" * 512 + b"b" * 512, done=True),
        data(512, b"a" * 512) + hole(1024, 512) + data(1536, b"b" * 512) + NONE,
        data(1536, b"b" * 512) + hole(1024, 512) + data(512, b"a" * 512, done=True),
        hole(1024, 512) + data(512, b"a" * 512) + data(1536, b"b" * 511) + data(2047, b"b", True),
    ],
)
def test_chunks_in_any_order(replies: bytes) -> None:
    with structured_client(replies) as client:
        assert client.read(1536, 512) == b"a" * 512 + bytes(512) + b"b" * 512


@pytest.mark.parametrize(
    "replies",
    [
        NONE,
        data(0, b"a" * 511) + NONE,
        data(1, b"a" * 511) + NONE,
        data(0, b"a" * 512) + data(511, b"a") + NONE,
        data(0, b"a" * 512) + data(0, b"a" * 512, done=True),
        hole(0, 256) + data(255, b"a" * 257, done=True),
        data(0, b"a" * 256) + data(255, b"a" * 256, done=True),
        hole(0, 100) + data(200, b"a" * 312, done=True),
        data(0, b"a" * 513, done=True),
        hole(0, 0) + data(0, b"a" * 512, done=True),
        chunk(9, b"", done=True),
        simple() + b"a" * 512,
    ],
)
def test_chunks_that_do_not_fit(replies: bytes) -> None:
    with structured_client(replies) as client:
        with pytest.raises(ProtocolError):
            client.read(512, 0)
        with pytest.raises(ConnectionError, match="connection is closed"):
            client.read(512, 0)


def test_an_error_chunk_fails_the_read_with_its_message() -> None:
    message = "sector not found"
    body = struct.pack(">IH", nbd.NBD_EIO, len(message)) + message.encode() + struct.pack(">Q", 256)
    replies = data(0, b"a" * 512) + chunk(2**15 + 2, body, done=True)
    with structured_client(replies) as client:
        with pytest.raises(OSError, match=message) as caught:
            client.read(512, 0)
        assert caught.value.errno == errno.EIO


def status(context: int, *extents: tuple[int, int], done: bool = False, cookie: int = 1) -> bytes:
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *item) for item in extents)
    return chunk(5, body, done, cookie)


def test_block_status_may_reach_further() -> None:
    with structured_client(status(7, (512, 0), (4096, 3), done=True)) as client:
        assert client.block_status(1024, 0) == [(512, 0), (4096, 3)]


@pytest.mark.parametrize(
    "replies",
    [
        NONE,
        status(8, (512, 0), done=True),
        status(7, (512, 0)) + status(7, (512, 0), done=True),
        status(7, (0, 0), done=True),
        status(7, done=True),
        status(7, (512, 0), (512, 3), done=True),  # One was asked for.
    ],
)
def test_block_status_that_lies(replies: bytes) -> None:
    with structured_client(replies) as client, pytest.raises(ProtocolError):
        client.block_status(512, 0, one=True)
