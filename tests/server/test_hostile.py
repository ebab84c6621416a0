"""What a client that breaks the rules gets, and that nobody else suffers from it."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pynbdkit
from raw import CACHE, DISC, FLUSH, READ, STATUS, TRIM, WRITE, ZEROES, Raw
from support import ServerProcess

EPERM, EINVAL, ENOSPC = 1, 22, 28
MIB = 1 << 20


@pytest.fixture
def server(serve: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """A RAM disk of 16 MiB; afterwards it must still serve, and its log hold no traceback."""
    process = serve("memory", "16M")
    yield process
    with Raw(str(process.socket)) as other:
        other.ask(READ, 7, 8192, 512)
        assert other.simple(512) == (7, 0, bytes(512))
    assert "Traceback" not in process.log()


def rss(process: ServerProcess) -> int:
    """Resident memory in bytes."""
    for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def peak(process: ServerProcess) -> int:
    for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize(
    ("kind", "offset", "count", "flags", "error"),
    [
        (READ, 16 * MIB, 512, 0, EINVAL),
        (READ, 16 * MIB - 1, 2, 0, EINVAL),
        (READ, 2**64 - 1, 2, 0, EINVAL),
        (READ, 2**63, 2**32 - 1, 0, EINVAL),
        (READ, 0, 0, 0, EINVAL),
        (READ, 0, 64 * MIB + 1, 0, EINVAL),
        (READ, 0, 512, 1 << 2, EINVAL),  # DF without structured replies
        (READ, 0, 512, 1 << 9, EINVAL),
        (READ, 0, 512, 1 << 1, EINVAL),  # NO_HOLE is for WRITE_ZEROES
        (TRIM, 16 * MIB, 512, 0, EINVAL),
        (TRIM, 0, 0, 0, EINVAL),
        (TRIM, 2**64 - 512, 1024, 0, EINVAL),
        (ZEROES, 16 * MIB, 512, 0, ENOSPC),
        (ZEROES, 2**64 - 512, 1024, 0, ENOSPC),
        (ZEROES, 0, 512, 1 << 3, EINVAL),
        (CACHE, 16 * MIB, 512, 0, EINVAL),
        (FLUSH, 0, 512, 0, EINVAL),
        (FLUSH, 512, 0, 0, EINVAL),
        (STATUS, 0, 512, 0, EINVAL),  # no context was negotiated
        (8, 0, 512, 0, EINVAL),  # RESIZE
        (0xFFFF, 0, 0, 0, EINVAL),
    ],
)
def test_a_bad_request_is_refused_and_the_connection_goes_on(
    server: ServerProcess, kind: int, offset: int, count: int, flags: int, error: int
) -> None:
    with Raw(str(server.socket)) as client:
        client.ask(kind, 5, offset, count, flags)
        assert client.simple() == (5, error, b"")
        client.ask(READ, 6, 0, 16)
        assert client.simple(16) == (6, 0, bytes(16))


@pytest.mark.parametrize(
    ("offset", "count"), [(16 * MIB, 512), (16 * MIB - 256, 512), (2**64 - 512, 1024)]
)
def test_a_write_beyond_the_end_is_refused_and_its_payload_passed_over(
    server: ServerProcess, offset: int, count: int
) -> None:
    with Raw(str(server.socket)) as client:
        client.ask(WRITE, 5, offset, count, payload=b"x" * count)
        client.ask(READ, 6, 16 * MIB - 256, 256)
        assert client.simple() == (5, ENOSPC, b"")
        assert client.simple(256) == (6, 0, bytes(256))


def test_an_oversized_write_is_skipped_not_stored(server: ServerProcess) -> None:
    with Raw(str(server.socket)) as client:
        client.ask(READ, 1, 0, 1)
        client.simple(1)
        before = peak(server)
        count = 200 * MIB
        client.ask(WRITE, 5, 0, count)
        piece = b"x" * MIB
        for _ in range(count // MIB):
            client.send(piece)
        assert client.simple() == (5, EINVAL, b"")
        client.ask(READ, 6, 0, 512)
        assert client.simple(512) == (6, 0, bytes(512))
        assert peak(server) - before < 8 * MIB


def test_a_write_of_nothing(server: ServerProcess) -> None:
    with Raw(str(server.socket)) as client:
        client.ask(WRITE, 5, 0, 0)
        assert client.simple() == (5, EINVAL, b"")


def test_a_read_only_export_refuses_every_way_to_write(
    serve: Callable[..., ServerProcess],
) -> None:
    process = serve("-r", "memory", "1M")
    with Raw(str(process.socket)) as client:
        client.ask(WRITE, 1, 0, 512, payload=b"x" * 512)
        assert client.simple() == (1, EPERM, b"")
        client.ask(WRITE, 2, 0, 512, flags=1, payload=b"x" * 512)
        assert client.simple() == (2, EPERM, b"")
        for kind in (TRIM, ZEROES):
            client.ask(kind, 3, 0, 512)
            assert client.simple() == (3, EPERM, b"")
        client.ask(READ, 4, 0, 512)
        assert client.simple(512) == (4, 0, bytes(512))


def test_bad_magic_ends_the_connection_after_what_came_before(server: ServerProcess) -> None:
    with Raw(str(server.socket)) as client:
        client.send(client.request(READ, 1, 0, 512) + b"\0" * 28)
        assert client.simple(512) == (1, 0, bytes(512))
        assert client.at_end()


def test_half_a_request_and_then_gone(server: ServerProcess) -> None:
    for sent in (1, 27):
        with Raw(str(server.socket)) as client:
            client.send(client.request(READ, 1, 0, 512)[:sent])
    with Raw(str(server.socket)) as client:
        client.ask(WRITE, 1, 0, MIB, payload=b"x" * 1000)
    with Raw(str(server.socket)) as client:
        client.ask(READ, 1, 0, MIB)
        assert client.simple(MIB)[2] == bytes(MIB)  # nothing of the half write was written


def test_a_byte_at_a_time(server: ServerProcess) -> None:
    with Raw(str(server.socket), go=False) as client:
        client.receive(18)
        words = b"\0\0\0\3" + b"IHAVEOPT" + bytes.fromhex("0000000700000006") + b"\0" * 6
        words += client.request(WRITE, 1, 100, 5) + b"hello" + client.request(READ, 2, 99, 7)
        for at in range(len(words)):
            client.send(words[at : at + 1])
        while client.reply()[1] != 1:
            pass
        assert client.simple() == (1, 0, b"")
        assert client.simple(7) == (2, 0, b"\0hello\0")


def test_disconnect_is_orderly(server: ServerProcess) -> None:
    with Raw(str(server.socket)) as client:
        client.send(client.request(READ, 1, 0, 512) + client.request(DISC, 2))
        assert client.simple(512) == (1, 0, bytes(512))
        assert client.at_end()


def flood(path: str, request: bytes, total: int) -> tuple[socket.socket, int]:
    """Send a request until nothing more is taken, or `total` bytes; replies are never read."""
    client = Raw(path, structured=True)
    client.sock.settimeout(1.0)
    sent = 0
    block = request * (MIB // len(request) + 1)
    try:
        while sent < total:
            sent += client.sock.send(block)
    except TimeoutError:
        pass
    return client.sock, sent


@pytest.mark.parametrize("options", [(), ("--filter=delay", "delay-read=0")])
@pytest.mark.parametrize("size", [4096, MIB])
def test_pipelined_reads_whose_replies_are_never_read(
    serve: Callable[..., ServerProcess], options: tuple[str, ...], size: int
) -> None:
    """Memory stays bounded, and other clients keep their service."""
    process = serve(*options[:1], "memory", "16M", *options[1:])
    with Raw(str(process.socket)) as first:
        first.ask(READ, 1, 0, 1)
        first.simple(1)
    before = rss(process)
    socks = []
    for _ in range(2):
        sock, sent = flood(str(process.socket), Raw.request(READ, 1, 0, size), 8 * MIB)
        socks.append(sock)
        assert sent >= 28 * 2000  # thousands of requests were taken, or wait in the kernel
    with Raw(str(process.socket)) as other:
        for cookie in range(100):
            other.ask(READ, cookie, 0, 4096)
            assert other.simple(4096) == (cookie, 0, bytes(4096))
    assert rss(process) - before < (64 if size == MIB and options else 24) * MIB
    for sock in socks:
        sock.close()
    assert process.stop() == 0
    assert "Traceback" not in process.log()


def test_a_gigabyte_of_writes_without_reading_a_reply(
    serve: Callable[..., ServerProcess],
) -> None:
    process = serve("null", "1G")
    with Raw(str(process.socket)) as first:
        first.ask(READ, 1, 0, 1)
        first.simple(1)
    before = peak(process)
    client = Raw(str(process.socket))
    count = MIB
    message = client.request(WRITE, 1, 0, count) + bytes(count)

    def write() -> None:
        for _ in range(1024):
            client.send(message)

    writer = threading.Thread(target=write)
    writer.start()  # it may have to wait: the kernel keeps some hundred replies, then we wait
    with Raw(str(process.socket)) as other:
        for cookie in range(200):
            other.ask(READ, cookie, 0, 4096)
            assert other.simple(4096)[:2] == (cookie, 0)
    for _ in range(1024):
        assert client.simple() == (1, 0, b"")
    writer.join()
    assert peak(process) - before < 16 * MIB
    client.close()


def test_no_descriptor_and_no_thread_is_left(server: ServerProcess) -> None:
    def open_files() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    def threads() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/task"))

    def settled(files: int, tasks: int) -> bool:
        done = threading.Event()
        for _ in range(400):
            if (open_files(), threads()) == (files, tasks):
                return True
            done.wait(0.01)  # the server sees our close when it gets round to it
        return False

    Raw(str(server.socket)).close()  # one that was served: the server has opened what it needs
    for _ in range(400):
        files, tasks = open_files(), threads()
        if tasks == 1:  # the main thread alone: whoever looked whether we listen is gone
            break
        threading.Event().wait(0.01)
    assert tasks == 1
    for round_ in range(100):
        client = Raw(str(server.socket), go=round_ % 4 != 0)
        if round_ % 4 == 1:
            client.send(b"\0" * 28)
        elif round_ % 4 == 2:
            client.ask(READ, 1, 0, MIB)
        elif round_ % 4 == 3:
            client.send(client.request(WRITE, 1, 0, MIB))
        client.close()
    assert settled(files, tasks), (files, open_files(), tasks, threads())


def test_out_of_descriptors_is_survived(serve: Callable[..., ServerProcess]) -> None:
    process = serve("memory", "1M")
    pid = process.process.pid
    soft = len(os.listdir(f"/proc/{pid}/fd")) + 8
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, soft))
    clients: list[Any] = []
    for _ in range(20):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(process.socket))
        clients.append(sock)
    served = 0
    for sock in clients:
        sock.settimeout(0.3 if served >= 6 else 5)
        try:
            served += sock.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
        except TimeoutError:
            break
    assert 6 <= served < 20
    for sock in clients:
        sock.close()
    with Raw(str(process.socket)) as client:
        client.ask(READ, 7, 0, 512)
        assert client.simple(512) == (7, 0, bytes(512))
    assert "Too many open files" in process.log()


def test_a_long_answer_in_the_handshake_arrives_whole(tmp_path: Path) -> None:
    class Many(pynbdkit.Plugin):
        def list_exports(self, readonly: bool, is_tls: bool) -> list[str]:
            return [f"export-{number:04}" for number in range(1000)]

    with pynbdkit.serve(Many()) as server, Raw(str(server.socket), go=False) as client:
        client.receive(18)
        client.send(b"\0\0\0\3" + (b"IHAVEOPT" + bytes.fromhex("0000000300000000")) * 50)
        for _ in range(50):
            for number in range(1000):
                assert client.reply()[2][4:] == b"export-%04d" % number
            assert client.reply()[1] == 1
