"""Stable storage: what a reply with FUA and a flush promise, and what happens when it fails.

Where a lost page cannot be had for real, the system calls of this process are replaced.
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import pytest

import pynbdkit
import support
from pynbdkit import fallocate
from pynbdkit.plugins import _stable
from pynbdkit.plugins._stable import MOST_DESCRIPTORS, StableFile, StableFiles
from pynbdkit.plugins.file import FilePlugin
from pynbdkit.session import Session

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


class Calls:
    """The system calls that write and sync, noted as (name, …) and, on demand, made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.failing: dict[str, Callable[[], OSError | None]] = {}
        for module, name in (
            (os, "pwrite"),
            (os, "pwritev"),
            (os, "fdatasync"),
            (fallocate, "fallocate"),
        ):
            self._replace(monkeypatch, module, name)

    def _replace(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        really = getattr(module, name)

        def call(fd: int, *rest: Any) -> Any:
            flag = rest[-1] if name == "pwritev" else None
            self.made.append((name, flag) if flag is not None else (name,))
            if name in self.failing and (failure := self.failing[name]()) is not None:
                raise failure
            return really(fd, *rest)

        monkeypatch.setattr(module, name, call)

    def fail(self, name: str, number: int, times: int = 1) -> None:
        """Let the next `times` calls fail."""
        left = [times]

        def decide() -> OSError | None:
            left[0] -= 1
            return OSError(number, os.strerror(number)) if left[0] >= 0 else None

        self.failing[name] = decide

    def take(self) -> list[tuple[Any, ...]]:
        made, self.made = self.made, []
        return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def server(disk: Path) -> Iterator[pynbdkit.RunningServer]:
    with pynbdkit.serve(FilePlugin(file=disk)) as server:
        yield server


def fails(nbd: ModuleType, request: Callable[..., Any], *arguments: Any) -> str:
    """The errno that the client gets."""
    with pytest.raises(nbd.Error) as caught:
        request(*arguments)
    return str(caught.value.errno)


# -- what is called --------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["default", "none"])
def test_each_request_syncs_as_much_as_it_promises(
    cache: str, nbd: ModuleType, disk: Path, connect: Callable[..., Any], calls: Calls
) -> None:
    with pynbdkit.serve(FilePlugin(file=disk, cache=cache)) as server:
        check_syncs(nbd, connect(server), calls)


def check_syncs(nbd: ModuleType, client: Any, calls: Calls) -> None:
    fua = nbd.CMD_FLAG_FUA
    client.pwrite(b"x" * 4096, 0)
    assert calls.take() == [("pwrite",)]
    client.pwrite(b"x" * 4096, 0, fua)
    assert calls.take() == [("pwritev", os.RWF_DSYNC)]
    client.flush()
    assert calls.take() == [("fdatasync",)]
    client.zero(4096, 0)
    assert calls.take() == [("fallocate",)]
    client.zero(4096, 0, fua)
    assert calls.take() == [("fallocate",), ("fdatasync",)]
    client.trim(4096, 0)
    assert calls.take() == [("fallocate",)]
    client.trim(4096, 0, fua)
    assert calls.take() == [("fallocate",), ("fdatasync",)]


def test_what_the_kernel_sees(
    nbd: ModuleType, disk: Path, sockdir: Path, connect: Callable[..., Any]
) -> None:
    strace = support.program("strace")
    trace = sockdir / "trace"
    command = [
        strace, "-D", "-f", "-o", str(trace),
        "-e", "trace=fdatasync,fsync,pwrite64,pwritev,pwritev2,fallocate",
        sys.executable, "-m", "pynbdkit",
    ]  # fmt: skip
    server = support.ServerProcess(sockdir, ["file", disk], command)
    try:
        client = connect(server)
        client.pwrite(b"x" * 4096, 0)
        client.pwrite(b"x" * 4096, 4096, nbd.CMD_FLAG_FUA)
        client.zero(4096, 8192, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
        client.trim(4096, 8192)
        client.flush()
        deadline = time.monotonic() + 30
        seen: list[str] = []
        while seen.count("fdatasync") < 2:
            assert time.monotonic() < deadline, seen
            text = trace.read_text()
            # Of a call that another thread interrupted in the trace, the second part.
            done = re.finditer(r"^\d+ +(?:<\.\.\. )?(\w+).* = (?:0|4096)$", text, re.MULTILINE)
            seen = [match[1] for match in done if match[1] != "fallocate"]
    finally:
        server.process.kill()
        server.process.wait()
    assert seen == ["pwrite64", "pwritev2", "fdatasync", "fdatasync"]
    assert re.search(r"pwritev2\(.*RWF_DSYNC", text)
    assert "FALLOC_FL_PUNCH_HOLE" in text


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_rwf_dsync(
    number: int, nbd: ModuleType, disk: Path, server: pynbdkit.RunningServer,
    connect: Callable[..., Any], calls: Calls,
) -> None:  # fmt: skip
    calls.fail("pwritev", number)
    client = connect(server)
    client.pwrite(b"abc", 5, nbd.CMD_FLAG_FUA)
    assert calls.take() == [("pwritev", os.RWF_DSYNC), ("pwrite",), ("fdatasync",)]
    connect(server).pwrite(b"def", 8, nbd.CMD_FLAG_FUA)
    assert calls.take() == [("pwrite",), ("fdatasync",)]
    assert disk.read_bytes()[5:11] == b"abcdef"
    calls.fail("fdatasync", errno.EIO)
    assert fails(nbd, client.pwrite, b"x", 0, nbd.CMD_FLAG_FUA) == "EIO"
    assert fails(nbd, client.flush) == "EIO"


# -- a sync that failed ----------------------------------------------------------------------------


def check_lost(nbd: ModuleType, server: Any, client: Any, calls: Calls) -> None:
    """No promise is made any more; but what promises nothing still works."""
    calls.failing.clear()
    calls.take()
    fua = nbd.CMD_FLAG_FUA
    assert fails(nbd, client.flush) == "EIO"
    assert fails(nbd, client.pwrite, b"x", 0, fua) == "EIO"
    assert fails(nbd, client.zero, 4096, 4096, fua) == "EIO"
    assert fails(nbd, client.trim, 4096, 4096, fua) == "EIO"
    client.pwrite(b"still", 100)
    client.zero(4096, 8192)
    assert client.pread(5, 100) == b"still"
    assert ("fdatasync",) not in calls.take()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_flush_is_never_forgotten(
    number: int, nbd: ModuleType, server: pynbdkit.RunningServer, connect: Callable[..., Any],
    calls: Calls,
) -> None:  # fmt: skip
    client, other = connect(server), connect(server)
    other.flush()
    calls.fail("fdatasync", number)
    expected = "EIO" if number == errno.EIO else "ENOSPC"
    assert fails(nbd, client.flush) == expected
    check_lost(nbd, server, client, calls)
    check_lost(nbd, server, other, calls)
    client.shutdown()
    other.shutdown()
    deadline = time.monotonic() + 30
    while server.connections and time.monotonic() < deadline:
        time.sleep(0.005)
    check_lost(nbd, server, connect(server), calls)


@pytest.mark.parametrize("request_name", ["zero", "trim"])
def test_a_failed_sync_after_zero_or_trim(
    request_name: str, nbd: ModuleType, server: pynbdkit.RunningServer,
    connect: Callable[..., Any], calls: Calls,
) -> None:  # fmt: skip
    client = connect(server)
    calls.fail("fdatasync", errno.EIO)
    assert fails(nbd, getattr(client, request_name), 4096, 0, nbd.CMD_FLAG_FUA) == "EIO"
    check_lost(nbd, server, client, calls)


def test_a_fua_write_that_lost_data(
    nbd: ModuleType, server: pynbdkit.RunningServer, connect: Callable[..., Any], calls: Calls
) -> None:
    """The write failed, and the witness says that the kernel has lost something."""
    client = connect(server)
    calls.fail("pwritev", errno.EIO)
    calls.fail("fdatasync", errno.EIO)
    assert fails(nbd, client.pwrite, b"x", 0, nbd.CMD_FLAG_FUA) == "EIO"
    check_lost(nbd, server, client, calls)


def test_a_fua_write_that_found_no_space(
    nbd: ModuleType, server: pynbdkit.RunningServer, connect: Callable[..., Any], calls: Calls
) -> None:
    """The write failed, and the witness says that nothing was lost: all is as before."""
    client = connect(server)
    calls.fail("pwritev", errno.ENOSPC)
    assert fails(nbd, client.pwrite, b"x", 0, nbd.CMD_FLAG_FUA) == "ENOSPC"
    assert calls.take() == [("pwritev", os.RWF_DSYNC), ("fdatasync",)]
    client.flush()
    client.pwrite(b"x", 0, nbd.CMD_FLAG_FUA)


def test_a_write_that_found_no_space_for_real(
    nbd: ModuleType, disk: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    server = serve("file", disk)
    client = connect(server)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (SIZE // 2, SIZE))
    for flags in (0, nbd.CMD_FLAG_FUA):
        assert fails(nbd, client.pwrite, b"x" * 4096, SIZE // 2, flags) == "ENOSPC"
        client.flush()
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (SIZE, SIZE))
    client.pwrite(b"x" * 4096, SIZE // 2, nbd.CMD_FLAG_FUA)
    client.flush()


def test_readers_learn_of_it_and_tell(
    nbd: ModuleType, disk: Path, connect: Callable[..., Any], calls: Calls
) -> None:
    """A flush on a read-only connection makes the same promise as on any other."""
    with pynbdkit.serve(FilePlugin(file=disk), readonly=True) as server:
        first, second = connect(server), connect(server)
        first.flush()
        assert calls.take() == [("fdatasync",)]
        calls.fail("fdatasync", errno.EIO)
        assert fails(nbd, first.flush) == "EIO"
        assert fails(nbd, second.flush) == "EIO"
        assert fails(nbd, connect(server).flush) == "EIO"


def test_other_files_are_not_concerned(
    nbd: ModuleType, disk: Path, connect: Callable[..., Any], calls: Calls
) -> None:
    (disk.parent / "other").write_bytes(bytes(4096))
    os.link(disk, disk.parent / "same")
    with pynbdkit.serve(FilePlugin(dir=disk.parent)) as server:
        client = connect(server.export_uri("disk"))
        calls.fail("fdatasync", errno.EIO)
        assert fails(nbd, client.flush) == "EIO"
        other = connect(server.export_uri("other"))
        other.pwrite(b"x", 0, nbd.CMD_FLAG_FUA)
        other.flush()
        same = connect(server.export_uri("same"))  # another name of the same file
        assert fails(nbd, same.flush) == "EIO"


def test_the_operator_is_told(
    nbd: ModuleType, server: pynbdkit.RunningServer, connect: Callable[..., Any], calls: Calls,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    client = connect(server)
    calls.fail("fdatasync", errno.EIO)
    fails(nbd, client.flush)
    fails(nbd, client.flush)
    assert "an earlier sync of this file failed (Input/output error)" in capfd.readouterr().err


@pytest.fixture
def failing_device(tmp_path: Path) -> Iterator[str]:
    """A block device whose storage is full: writes are accepted, and lost when they are synced."""
    support.need_root("a mount and a loop device")
    folder = tmp_path / "small"
    folder.mkdir()
    support.run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder)
    device = ""
    try:
        with (folder / "image").open("wb") as stream:
            stream.truncate(16 << 20)
        device = support.run("losetup", "-f", "--show", folder / "image").stdout.strip()
        yield device
    finally:
        if device:
            support.run("losetup", "-d", device)
        support.run("umount", "-l", folder)


@pytest.mark.parametrize("fua", [False, True])
def test_lost_for_real(
    fua: bool, nbd: ModuleType, failing_device: str, serve: Callable[..., Any],
    connect: Callable[..., Any],
) -> None:  # fmt: skip
    server = serve("file", failing_device)
    client, other = connect(server), connect(server)
    client.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
    client.flush()
    data = os.urandom(4 << 20)
    if fua:
        assert fails(nbd, client.pwrite, data, 0, nbd.CMD_FLAG_FUA) in ("EIO", "ENOSPC")
    else:
        client.pwrite(data, 0)
        assert fails(nbd, client.flush) in ("EIO", "ENOSPC")
    for handle in (client, other, connect(server)):
        for _ in range(2):
            assert fails(nbd, handle.flush) == "EIO"
            assert fails(nbd, handle.pwrite, b"x", 0, nbd.CMD_FLAG_FUA) == "EIO"


# -- syncs that are shared -------------------------------------------------------------------------


class SlowDisk:
    """fdatasync of this process: it has begun when it says so, and ends when it is told how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun: SimpleQueue[None] = SimpleQueue()
        self._ends: SimpleQueue[OSError | None] = SimpleQueue()
        self.count = 0
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)

    def _fdatasync(self, fd: int) -> None:
        self.count += 1
        self._begun.put(None)
        failure = self._ends.get(timeout=30)
        if failure is not None:
            raise failure

    def begins(self) -> None:
        """Wait for a sync to begin."""
        self._begun.get(timeout=30)

    def end(self, number: int = 0) -> None:
        """Let it end; number: an errno, to fail with."""
        self._ends.put(OSError(number, os.strerror(number)) if number else None)


def wait(client: Any, cookie: int) -> None:
    """Wait for the answer. Raises nbd.Error for an error."""
    while not client.aio_command_completed(cookie):
        client.poll(30_000)


@pytest.mark.parametrize("same", [False, True])
def test_a_flush_is_not_answered_by_a_sync_that_runs(
    same: bool, server: pynbdkit.RunningServer, connect: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A write that is answered while the sync of a first flush runs, and then a second flush."""
    disk = SlowDisk(monkeypatch)
    first = connect(server)
    second = first if same else connect(server)
    early = first.aio_flush()
    disk.begins()
    second.pwrite(b"x" * 512, 0)
    late = second.aio_flush()
    second.pread(512, 0)  # so the server has the flush, too, and it holds up nothing
    disk.end()
    wait(first, early)
    disk.begins()  # another one
    second.pread(512, 0)
    assert not second.aio_command_completed(late)
    disk.end()
    wait(second, late)
    assert disk.count == 2


def test_all_who_wait_are_told_of_the_failure(
    nbd: ModuleType, server: pynbdkit.RunningServer, connect: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whether their flush waited for the sync that failed, or for the one after it."""
    disk = SlowDisk(monkeypatch)
    clients = [connect(server) for _ in range(6)]
    cookies = [clients[0].aio_flush()]
    disk.begins()
    cookies += [client.aio_flush() for client in clients[1:]]
    disk.end(errno.EIO)
    for client, cookie in zip(clients, cookies, strict=True):
        assert fails(nbd, wait, client, cookie) == "EIO"
    assert disk.count == 1, "after a failure nothing is tried again"


def test_many_flushes_take_few_syncs(
    nbd: ModuleType, disk: Path, sockdir: Path, connect: Callable[..., Any]
) -> None:
    """Eight connections with six flushes each in flight, on a disk that takes 20 ms to sync."""
    trace, pidfile = sockdir / "trace", sockdir / "pid"
    command = [
        support.program("strace"), "-f", "-o", str(trace), "-e", "trace=fdatasync",
        "-e", "inject=fdatasync:delay_enter=20000",
        sys.executable, "-m", "pynbdkit", "-P", str(pidfile),
    ]  # fmt: skip
    server = support.ServerProcess(sockdir, ["file", disk], command)
    clients = [connect(server) for _ in range(8)]
    cookies = [(client, client.aio_flush()) for client in clients for _ in range(6)]
    for client, cookie in cookies:
        wait(client, cookie)
    clients[0].pwrite(b"x", 0)
    clients[0].flush()
    os.kill(int(pidfile.read_text()), signal.SIGTERM)
    assert server.process.wait(30) == 0  # strace has written all of it
    count = trace.read_text().count("fdatasync(")
    assert 2 <= count <= len(cookies) // 3


# -- descriptors -----------------------------------------------------------------------------------


@pytest.fixture
def stable(disk: Path) -> Iterator[StableFile]:
    files = StableFiles()
    fd = os.open(disk, os.O_RDWR)
    info = os.fstat(fd)
    before = len(os.listdir("/proc/self/fd"))
    file = files.acquire(fd, info, True)
    yield file
    files.release(file, info)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_no_two_syncs_share_a_descriptor(
    stable: StableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first to look would be told of the page that the other has lost."""
    running: set[int] = set()
    used: set[int] = set()
    lock = threading.Lock()
    really = os.pwritev

    def slow(fd: int, *rest: Any) -> int:
        with lock:
            assert fd not in running
            running.add(fd)
            used.add(fd)
        time.sleep(0.001)  # so that they overlap
        with lock:
            running.remove(fd)
        return really(fd, *rest)

    monkeypatch.setattr(os, "pwritev", slow)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: stable.write_through(memoryview(b"x" * 512), n * 512), range(300)))
    assert 1 < len(used) <= MOST_DESCRIPTORS


def test_one_thread_needs_one_descriptor(stable: StableFile) -> None:
    for _ in range(5):
        stable.write_through(memoryview(b"x"), 0)
        stable.sync()
    assert stable._count == 1


def test_the_stock_grows_only_while_nothing_is_synced(
    stable: StableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new descriptor would not be told what a running sync has just been told."""
    started, go_on = threading.Event(), threading.Event()
    opened: list[int] = []
    really = _stable.own_descriptor

    def noted(fd: int, access: int) -> int:
        opened.append(fd)
        assert go_on.is_set()
        return really(fd, access)

    def fail(fd: int) -> None:
        started.set()
        go_on.wait(30)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(_stable, "own_descriptor", noted)
    monkeypatch.setattr(os, "fdatasync", fail)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stable.sync)
        assert started.wait(30)
        second = pool.submit(stable.write_through, memoryview(b"x"), 0)
        while not stable._growing.locked():
            time.sleep(0.001)
        go_on.set()
        for future, said in ((first, "^.Errno 5. lost"), (second, "an earlier sync")):
            with pytest.raises(OSError, match=said):
                future.result(30)
    assert opened


class WatchedStock:
    """The idle descriptors; says when somebody waits for one."""

    def __init__(self, stock: Any) -> None:
        self.get_nowait, self.put = stock.get_nowait, stock.put
        self.waited_for = threading.Event()
        self._stock = stock

    def get(self) -> int:
        self.waited_for.set()
        return self._stock.get()  # type: ignore[no-any-return]


def test_a_descriptor_does_not_tell_twice(
    stable: StableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush waits for the one descriptor, whose write with FUA is told of a lost page."""
    monkeypatch.setattr(stable, "_most", 1)
    started, go_on = threading.Event(), threading.Event()
    synced: list[int] = []

    def lose(fd: int, *_: Any) -> int:
        started.set()
        assert go_on.wait(30)
        raise OSError(errno.EIO, "lost")

    def sync(fd: int) -> None:  # the kernel tells each descriptor once: here, the witness
        synced.append(fd)
        if fd == stable._witness and synced.count(fd) == 1:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "pwritev", lose)
    monkeypatch.setattr(os, "fdatasync", sync)
    with ThreadPoolExecutor(2) as pool:
        write = pool.submit(stable.write_through, memoryview(b"x"), 0)
        assert started.wait(30)
        stock = WatchedStock(stable._idle)
        monkeypatch.setattr(stable, "_idle", stock)
        flush = pool.submit(stable.sync)
        assert stock.waited_for.wait(30)
        go_on.set()
        for future in (write, flush):
            with pytest.raises(OSError, match="lost"):
                future.result(30)


def test_without_descriptors_of_its_own(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc: one descriptor then, and who waits for it is right all the same."""

    def refuse(fd: int, access: int) -> int:
        raise OSError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(_stable, "own_descriptor", refuse)
    files = StableFiles()
    fd = os.open(disk, os.O_RDWR)
    info = os.fstat(fd)
    file = files.acquire(fd, info, True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: file.write_through(memoryview(b"y" * 512), n * 512), range(64)))
    assert disk.read_bytes()[: 64 * 512] == b"y" * 512 * 64
    monkeypatch.setattr(os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(OSError, match="bad"):
        file.write_through(memoryview(b"x"), 0)
    with pytest.raises(OSError, match="earlier sync"):  # no witness: the worst is assumed
        file.sync()
    files.release(file, info)
    os.close(fd)


def test_a_descriptor_that_cannot_be_opened_is_waited_for(
    stable: StableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, access: int) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(_stable, "own_descriptor", refuse)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: stable.write_through(memoryview(b"x"), n), range(100)))
    assert stable._count == 1


def test_close_that_reports_a_failed_write(
    nbd: ModuleType, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = StableFiles()
    fd = os.open(disk, os.O_RDWR)
    info = os.fstat(fd)
    file = files.acquire(fd, info, True)
    really = os.close

    def close(fd: int) -> None:
        really(fd)
        raise OSError(errno.EIO, "lost at close")

    monkeypatch.setattr(os, "close", close)
    file.close(fd)
    monkeypatch.undo()
    files.release(file, info)
    fd = os.open(disk, os.O_RDWR)
    again = files.acquire(fd, info, True)
    with pytest.raises(OSError, match="lost at close"):
        again.sync()
    files.release(again, info)
    os.close(fd)


def test_many_fua_writes_at_once(
    nbd: ModuleType, disk: Path, serve: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    server = serve("file", disk)
    model = bytearray(disk.read_bytes())
    chooser = random.Random(5)
    clients = [connect(server) for _ in range(2)]
    places = chooser.sample(range(SIZE // 512), 200)
    for client_number, client in enumerate(clients):
        for place in places[client_number::2]:
            data = chooser.randbytes(512)
            model[place * 512 : place * 512 + 512] = data
            flags = nbd.CMD_FLAG_FUA if chooser.random() < 0.7 else 0
            client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), place * 512, flags=flags)
    for client in clients:
        while client.aio_in_flight() > 0:
            client.poll(-1)
            while client.aio_in_flight() and (cookie := client.aio_peek_command_completed()) > 0:
                assert client.aio_command_completed(cookie)
    assert disk.read_bytes() == model


# -- several processes -----------------------------------------------------------------------------


def test_what_one_process_learns_is_for_all(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for one that opens the file afterwards, whose descriptors the kernel tells nothing."""
    files = StableFiles()
    files.share()
    other = disk.parent / "other"
    other.write_bytes(bytes(4096))
    fds = [os.open(path, os.O_RDWR) for path in (disk, other)]
    infos = [os.fstat(fd) for fd in fds]
    before = files.acquire(fds[0], infos[0], True)
    before.sync()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        status = 1
        try:
            mine = files.acquire(fds[0], infos[0], True)
            monkeypatch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "ö")))
            try:
                mine.sync()
            except OSError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    after = files.acquire(fds[0], infos[0], True)
    for file in (before, after):
        for attempt in (file.sync, lambda file=file: file.write_through(memoryview(b"x"), 0)):
            with pytest.raises(OSError, match=r"earlier sync of this file failed \(ö\)"):
                attempt()
    innocent = files.acquire(fds[1], infos[1], True)
    innocent.sync()
    for file, info in ((before, infos[0]), (after, infos[0]), (innocent, infos[1])):
        files.release(file, info)
    for fd in fds:
        os.close(fd)


def test_a_failure_that_another_process_was_told_meanwhile(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our sync began before it was written down, with a descriptor that is too young to know."""
    files = StableFiles()
    files.share()
    fd = os.open(disk, os.O_RDWR)
    info = os.fstat(fd)
    file = files.acquire(fd, info, True)
    monkeypatch.setattr(
        os, "fdatasync", lambda fd: StableFile(file._key, file._failures)._fail(OSError(5, "lost"))
    )
    with pytest.raises(OSError, match="earlier sync"):
        file.sync()
    monkeypatch.undo()
    files.release(file, info)
    os.close(fd)


def test_a_descriptor_that_workers_would_share_is_refused(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports to one of them only."""
    fd = os.open(disk, os.O_RDWR)
    plugin = FilePlugin()
    plugin.load()
    plugin.config("fd", str(fd))
    plugin.config_complete()
    really = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(13, "no /proc")
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    plugin.open(Session()).close()
    plugin.worker_count = 2
    with pytest.raises(PermissionError):
        plugin.open(Session())
    os.close(fd)
