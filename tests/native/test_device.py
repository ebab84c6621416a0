"""Requests to plugins in C: errors, extents, long ranges, threads, memory.

`disk.c` has the cases, by offset.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import heap
from pynbdkit.errors import OpenError
from pynbdkit.native import device
from pynbdkit.session import Session
from raw import CACHE, READ, STATUS, TRIM, ZEROES, Raw
from storm import Storm

Built = Callable[..., Path]
MIB = 1 << 20
SPECIAL = 16 * MIB
HUGE_AT = 1 << 40


@pytest.fixture
def opened(built: Built) -> Any:
    """A device of disk.c, without a server."""
    return pynbdkit.load_plugin(str(built("disk"))).open(Session())


@contextmanager
def served_by_peer(peer: str, path: Path, folder: Path) -> Iterator[Any]:
    with support.ServerProcess(folder, [path], [peer]) as server:
        yield server


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("preserved", [0, 1])
def test_errors(
    built: Built, nbd: Any, peer: str, sockdir: Path, version: int, preserved: int
) -> None:
    """What the client gets for errno, nbdkit_set_error, both and neither: as from the peer."""
    path = built("disk", f"-DNBDKIT_API_VERSION={version}", f"-DPRESERVED={preserved}")

    def errors(uri: str) -> list[str]:
        client = nbd.NBD()
        client.connect_uri(uri)
        found = []
        for case in (*range(10), 12, 4):  # what comes after another has its own errno
            try:
                client.pread(512, SPECIAL + case * MIB)
                found.append("good")
            except nbd.Error as error:
                found.append(error.errno)
        client.shutdown()
        return found

    with pynbdkit.serve(pynbdkit.load_plugin(str(path))) as server:
        ours = errors(server.uri)
    with served_by_peer(peer, path, sockdir) as server:
        theirs = errors(server.uri)
    assert theirs.pop(9) == "EINVAL"  # ETIMEDOUT: the contract has EIO where nothing fits
    assert ours.pop(9) == "EIO"
    assert ours == theirs
    of_errno = "ENOSPC" if preserved else "EIO"
    assert ours == [
        *(of_errno, "ENOSPC", "ENOMEM", of_errno, "EIO", "good", "EPERM", "ENOSPC", "ESHUTDOWN"),
        *("EPERM", "EIO"),
    ]


# -- extents ---------------------------------------------------------------------------------------


def within(entries: list[int], count: int) -> list[int]:
    """Block status, cut at the request's end: what is said beyond it is the server's choice."""
    found: list[int] = []
    for length, kind in zip(entries[::2], entries[1::2], strict=True):
        if count:
            found += [min(length, count), kind]
            count -= found[-2]
    return found


@pytest.mark.parametrize("one", [False, True])
def test_extents(built: Built, nbd: Any, peer: str, sockdir: Path, one: bool) -> None:
    """Right or wrong in every way: the client gets what it gets from the peer."""
    path = built("disk")

    def statuses(uri: str) -> list[Any]:
        client = nbd.NBD()
        client.add_meta_context("base:allocation")
        client.connect_uri(uri)
        found: list[Any] = []
        for case in range(17):
            entries: list[int] = []

            def note(name: str, offset: int, more: list[int], error: Any) -> int:
                entries.extend(more)  # noqa: B023
                return 0

            flags = nbd.CMD_FLAG_REQ_ONE if one else 0
            try:
                client.block_status(4096, SPECIAL + case * MIB, note, flags)
                found.append(within(entries, 4096))
            except nbd.Error as error:
                found.append(error.errno)
        client.shutdown()
        return found

    with pynbdkit.serve(pynbdkit.load_plugin(str(path))) as server:
        ours = statuses(server.uri)
    with served_by_peer(peer, path, sockdir) as server:
        theirs = statuses(server.uri)
    assert [*map(type, ours)] == [*map(type, theirs)]
    for case, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our == their, case
    if not one:
        assert ours[6] == [512, 3]
        assert ours[9] == [1024, 2]
        assert len(ours[13]) == 1024


def test_many_extents(built: Built, opened: Any) -> None:
    """A plugin may say more than is passed on."""
    found = opened.extents(16 * MIB, SPECIAL + 13 * MIB, 0)
    assert len(found) == 1 << 20
    assert found[0] == (SPECIAL + 13 * MIB, 8, 0)
    assert found[-1][0] == found[-2][0] + 8


# -- long ranges -----------------------------------------------------------------------------------


def test_longer_than_c_can_say(built: Built) -> None:
    """Extended headers ask for more than 32 bits at once: it comes in pieces, or a part is told."""
    length = 3 * device.LONGEST + 512
    pieces = [(device.LONGEST, number * device.LONGEST) for number in range(3)]
    pieces.append((512, 3 * device.LONGEST))
    assert device.LONGEST % 65536 == 0 < device.LONGEST < 1 << 32
    plugin = pynbdkit.load_plugin(str(built("disk")))
    with (
        pynbdkit.serve(plugin) as server,
        Raw(server.socket or "", extended=True, contexts=("base:allocation",)) as client,
    ):

        def calls() -> list[str]:
            client.ask(READ, 9, HUGE_AT, 4096)
            kind, payload = client.extended_chunk()[-2:]
            assert kind == 1
            return payload[8:].rstrip(b"\0").decode().splitlines()

        for command, name, flags in ((TRIM, "trim", 0), (ZEROES, "zero", 1), (CACHE, "cache", 0)):
            client.ask(command, 5, HUGE_AT, length)
            assert client.extended_chunk()[3] == 0
            assert calls() == [f"{name} {count} {offset} {flags}" for count, offset in pieces]
        client.ask(STATUS, 6, HUGE_AT, length)
        payload = client.extended_chunk()[4]
        assert int.from_bytes(payload[8:16], "big") == device.LONGEST
        assert calls() == [f"extents {device.LONGEST} 0 0"]


# -- threads ---------------------------------------------------------------------------------------


MODELS = {0: 1, 1: 1, 2: 2, 3: 6}
"""How many of two clients' requests, three each, may be in the plugin at a time."""


@pytest.mark.parametrize("model", MODELS)
def test_thread_models(built: Built, nbd: Any, model: int) -> None:
    """Calls that take long: as many at a time as the plugin's thread model lets be."""
    plugin = pynbdkit.load_plugin(str(built("disk", f"-DTHREAD_MODEL={model}")))
    with pynbdkit.serve(plugin) as server:

        def one_client(rounds: int, seen: list[int]) -> None:
            client = nbd.NBD()
            client.connect_uri(server.uri)
            for _ in range(rounds):
                buffers = [nbd.Buffer(1) for _ in range(3)]
                cookies = [client.aio_pread(buf, SPECIAL + 10 * MIB) for buf in buffers]
                for cookie in cookies:
                    while not client.aio_command_completed(cookie):
                        client.poll(-1)
                seen += [buf.to_bytearray()[0] for buf in buffers]
            client.shutdown()

        seen: list[int] = []
        threads = [threading.Thread(target=one_client, args=(4, seen)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 24
    assert max(seen) <= MODELS[model]
    if model:
        assert max(seen) >= min(MODELS[model], 3)


def test_requests_that_wait_for_each_other(built: Built, nbd: Any) -> None:
    """Of one client: a call that waits for another does not keep it from running."""
    with pynbdkit.serve(pynbdkit.load_plugin(str(built("disk")))) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri)
        buffers = [nbd.Buffer(1) for _ in range(2)]
        cookies = [client.aio_pread(buf, SPECIAL + 11 * MIB) for buf in buffers]
        for cookie in cookies:
            while not client.aio_command_completed(cookie):
                client.poll(-1)
        client.shutdown()


def test_a_long_call_holds_up_nobody(built: Built, nbd: Any) -> None:
    """While one client's read takes long, Python and another client go on."""
    with pynbdkit.serve(pynbdkit.load_plugin(str(built("disk")))) as server:
        slow, quick = nbd.NBD(), nbd.NBD()
        for client in (slow, quick):
            client.connect_uri(server.uri)
        # Returns when a second one comes, which is the quick client's last.
        cookie = slow.aio_pread(nbd.Buffer(1), SPECIAL + 11 * MIB)
        slow.poll(0)
        for _ in range(50):
            quick.pread(4096, 0)
        assert not slow.aio_command_completed(cookie)
        quick.pread(1, SPECIAL + 11 * MIB)
        while not slow.aio_command_completed(cookie):
            slow.poll(-1)
        for client in (slow, quick):
            client.shutdown()


@pytest.mark.parametrize("version", [1, 2])
def test_a_storm(built: Built, nbd: Any, version: int) -> None:
    """Every kind of request, many at a time, on four connections: every byte is right."""
    path = built("disk", f"-DNBDKIT_API_VERSION={version}")
    with pynbdkit.serve(pynbdkit.load_plugin(str(path)), threads=16) as server:
        clients = []
        for _ in range(4):
            client = nbd.NBD()
            client.add_meta_context("base:allocation")
            client.connect_uri(server.uri)
            clients.append(client)
        storm = Storm(nbd, clients, bytes(4 * MIB), seed=version)
        storm.run(1500)
        content = b"".join(clients[0].pread(MIB, number * MIB) for number in range(4))
        storm.compare(content, storm.content, 0, "in the end")
        for client in clients:
            client.shutdown()


# -- buffers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count",
    [1, 2, 511, device.COPIED - 1, device.COPIED, device.COPIED + 1, device.COPIED + 2, MIB],
)
def test_every_kind_of_buffer(opened: Any, count: int) -> None:
    """Bytes, arrays, views of them, read-only ones, from the middle."""
    data = os.urandom(count + 9)
    middle = memoryview(bytearray(data))[5 : 5 + count]
    buffers: tuple[Any, ...] = (
        data[5 : 5 + count],
        bytearray(data[5 : 5 + count]),
        middle,
        middle.toreadonly(),
        memoryview(data)[5 : 5 + count],
        memoryview((ctypes.c_char * count).from_buffer(bytearray(data[5 : 5 + count]))).cast("B"),
    )
    for number, buf in enumerate(buffers):
        opened.pwrite(buf, 3, 0)
        assert bytes(opened.pread(count, 3, 0)) == data[5 : 5 + count], number
        opened.pwrite(bytes(count), 3, 0)


def test_reads_are_never_shared(opened: Any) -> None:
    """Python keeps one object for each single byte and for none: they are not written to."""
    opened.pwrite(b"\xff" * 4, 0, 0)
    kept = [bytes([number]) for number in range(256)]
    for count in (0, 1, 2):
        assert opened.pread(count, 0, 0) == b"\xff" * count
    assert [bytes([number]) for number in range(256)] == kept
    assert bytes(0) == b""
    assert [*map(ord, kept)] == [*range(256)]
    first = opened.pread(512, 0, 0)
    opened.pwrite(b"\x11" * 512, 0, 0)
    assert first[:4] == b"\xff" * 4
    assert opened.pread(512, 0, 0) == b"\x11" * 512


def test_payloads_are_let_go(opened: Any) -> None:
    """After a write nobody holds the buffer, which may be resized then; also after a failed one."""
    buf = bytearray(device.COPIED + 100)
    opened.pwrite(memoryview(buf), 0, 0)
    buf.append(1)


def test_a_fast_zero_of_version_1(built: Built) -> None:
    """Version 1 cannot be told to be fast: it fails at once, and nothing is called."""
    plugin = pynbdkit.load_plugin(str(built("disk", "-DNBDKIT_API_VERSION=1")))
    found: Any = plugin.open(Session())
    found.pwrite(b"x" * 512, 0, 0)
    with pytest.raises(OSError, match="no fast zero") as caught:
        found.zero(512, 0, 8)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert found.pread(512, 0, 0) == b"x" * 512
    found.zero(512, 0, 1)
    assert found.pread(512, 0, 0) == bytes(512)


def test_a_question_that_fails() -> None:
    """It is not guessed: the open fails, and the error number is told where there is one."""
    library = SimpleNamespace(
        error_of_call=lambda preserved: errno.ENOMEM,
        pynbdkit_ask=lambda function, handle: -1,
        pynbdkit_get_size=lambda function, handle: -1,
    )
    maker = device._Maker("mine", SimpleNamespace(api_version=2, errno_is_preserved=1), library)  # type: ignore[arg-type]
    for make, name in ((maker.question, "can_write"), (maker.get_size, "get_size")):
        with pytest.raises(OpenError, match=f"mine: {name} failed: Cannot allocate memory"):
            make(name, 1)(SimpleNamespace(_handle=1))


# -- memory ----------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_requests_leave_nothing(opened: Any) -> None:
    """Neither in Python nor in C, good or not."""
    payload = memoryview(bytearray(65536))

    def requests(count: int) -> None:
        for _ in range(count):
            opened.pread(65536, 0, 0)
            opened.pwrite(payload, 0, 0)
            opened.pwrite(payload[:512], 0, 0)
            opened.extents(65536, SPECIAL + 13 * MIB, 0)
            opened.zero(512, 0, 1)
            opened.flush(0)
            opened.can_multi_conn()
            with pytest.raises(OSError):
                opened.pread(512, SPECIAL, 0)
            with pytest.raises(OSError):
                opened.extents(512, SPECIAL + 2 * MIB, 0)

    requests(20)
    gc.collect()
    blocks, before = sys.getallocatedblocks(), resident()
    requests(200)
    gc.collect()
    assert sys.getallocatedblocks() - blocks < 100
    assert resident() - before < 2 * MIB  # 200 lists of extents alone would be 38 MiB


def test_large_reads_keep_the_heap(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the kernel is asked for the pages of each large read anew, which takes twice as long."""
    done: list[bool] = []
    monkeypatch.setattr(heap, "_done", done)
    opened.pread(heap.LARGE - 1, 0, 0)
    assert not done
    opened.pread(heap.LARGE, 0, 0)
    assert done


def test_connections_leave_nothing(built: Built, nbd: Any) -> None:
    """A handle and its targets go with the connection."""
    with pynbdkit.serve(pynbdkit.load_plugin(str(built("disk")))) as server:

        def clients(count: int) -> None:
            for _ in range(count):
                client = nbd.NBD()
                client.connect_uri(server.uri)
                client.pread(512, 0)
                client.pwrite(b"x" * 512, 0)
                client.shutdown()
            while server.connections:
                time.sleep(0.001)
            gc.collect()

        clients(10)
        blocks = sys.getallocatedblocks()
        clients(100)
        assert sys.getallocatedblocks() - blocks < 300
