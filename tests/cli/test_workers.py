"""--workers: several processes serve one disk, seen from outside by clients of others."""

from __future__ import annotations

import os
import pty
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import support
from certificates import Certificates
from command import (
    COMMAND,
    SLOW,
    daemon,
    running,
    status_of,
    wait_for_end,
    wait_for_file,
    wait_until,
)
from pynbdkit.cli import workers
from pynbdkit.cli.options import UsageError
from support import ROOT, ServerProcess, need_root, pynbdkit

Serve = Callable[..., ServerProcess]
Connect = Callable[..., Any]

MIB = 1 << 20
SHARED = SLOW + "forkable = True\ndef thread_model(): return nbdkit.THREAD_MODEL_PARALLEL\n"
"""`SLOW`, for several processes; a disk whose size says which of them it is."""
WHO = """\
import os
import nbdkit
forkable = True
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly): return 1
def get_size(h): return os.getpid()
def pread(h, count, offset): return bytes(count)
"""
"""A disk whose size is the number of the process that serves it."""


COROUTINES = f"""\
API_VERSION = 2
{WHO.partition("def pread")[0]}
import asyncio
async def after_fork():
    global lock
    lock = asyncio.Lock()
async def pread(h, buf, offset, flags):
    async with lock:
        buf[:] = os.getpid().to_bytes(8, "big").rjust(len(buf))
"""
"""The same, whose content is that number, too; on an event loop."""


def uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sorted(map(int, text.split()))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def wait_for_workers(pid: int, count: int, without: int = 0) -> list[int]:
    """Wait until a supervisor has so many workers, and one of them is gone."""

    def there() -> bool:
        found = children(pid)
        return len(found) == count and without not in found

    wait_until(f"{count} workers", there)
    return children(pid)


def visit(path: Path) -> None:
    """Be greeted, and go again."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def workers_of(server: ServerProcess) -> list[int]:
    """Its two workers, when it has started and nobody is connected."""
    visit(server.socket)
    pids = wait_for_workers(server.process.pid, 2)
    # The thread of a connection ends when the supervisor has been told.
    wait_until("rest", lambda: all(threads(pid) == 1 for pid in pids))
    return pids


def opened(pids: list[int]) -> list[int]:
    """pidfds, to see the processes' ends with."""
    return [os.pidfd_open(pid) for pid in pids]


def assert_all_end(pidfds: list[int]) -> None:
    for fd in pidfds:
        assert wait_for_end(fd), "a worker is left behind"
        os.close(fd)


def in_workers(server: Any, connect: Connect, count: int = 2) -> dict[int, Any]:
    """A connection to each worker of a server whose disk is `WHO`."""
    handles = [connect(server) for _ in range(count)]
    return {handle.get_size(): handle for handle in handles}


# -- what they share -------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as stream:
        stream.truncate(4 * MIB)
    return path


DISKS = {
    "memory": ("memory", "4M"),
    "memory, all of it": ("memory", "4M", "allocator=malloc"),
    "data": ("data", "0*4194304"),
    "file": ("file", "{disk}"),
    "file, uncached": ("file", "{disk}", "cache=none"),
    "a folder": ("file", "dir={disk.parent}"),
    "filters": (
        "--filter=nofilter",
        "--filter=offset",
        "--filter=fua",
        "--filter=ip",
        "memory",
        "5M",
        "offset=1M",
        "fuamode=pass",
        "allow=all",
    ),
}


@pytest.mark.parametrize("kind", DISKS)
def test_all_workers_serve_one_disk(
    kind: str, disk: Path, serve: Serve, nbd: ModuleType, connect: Connect
) -> None:
    """Written through one, read, zeroed and trimmed through the other; extents are alike."""
    server = serve("--workers=2", *(word.format(disk=disk) for word in DISKS[kind]))
    assert len(workers_of(server)) == 2
    source = server.export_uri("disk") if kind == "a folder" else server
    one, two = connect(source), connect(source)
    assert one.can_multi_conn()
    content = random.Random(3).randbytes(MIB)
    one.pwrite(content, MIB)
    assert two.pread(MIB, MIB) == content
    two.flush()
    two.zero(4096, MIB)
    two.trim(65536, MIB + 65536)
    one.zero(100, MIB + 5000, nbd.CMD_FLAG_NO_HOLE)
    expected = bytearray(content)
    expected[:4096] = bytes(4096)
    expected[65536:131072] = bytes(65536)
    expected[5000:5100] = bytes(100)
    assert one.pread(MIB, MIB) == two.pread(MIB, MIB) == expected
    for handle in (one, two):
        extents: list[int] = []
        handle.block_status(
            4 * MIB, 0, lambda name, at, entries, error, into=extents: into.extend(entries)
        )
        states = b"".join(
            bytes([state]) * (length // 4096)
            for length, state in zip(extents[::2], extents[1::2], strict=True)
        )
        blank = 0 if "malloc" in "".join(DISKS[kind]) else 3
        assert states[:256] == bytes([blank]) * 256
        assert states[273:288] == states[0:15]  # what was trimmed
        assert states[288:512] == bytes(224)
        assert states[512:] == bytes([blank]) * 512


@pytest.mark.parametrize("words", [("null", "1M"), ("pattern", "1M"), ("full", "1M"), ("zero",)])
def test_disks_that_do_not_change(words: tuple[str, ...], serve: Serve, connect: Connect) -> None:
    server = serve("--workers=3", *words)
    handles = [connect(server) for _ in range(3)]
    assert {handle.can_multi_conn() for handle in handles} == {1}
    if words[0] != "zero":
        assert len({bytes(handle.pread(4096, 4096)) for handle in handles}) == 1


def shared_kilobytes(pid: int) -> int:
    """What a process has mapped of memory that it shares."""
    return int(status_of(pid)["RssShmem"].split()[0])


def test_trim_gives_shared_memory_back(serve: Serve, connect: Connect) -> None:
    """Also what others have written; and nothing was reserved before."""
    server = serve("--workers=2", "memory", "1T")
    pids = workers_of(server)
    one, two = connect(server), connect(server)

    def kilobytes() -> list[int]:
        return [shared_kilobytes(pid) for pid in pids]

    before = kilobytes()
    for at in range(0, 32 * MIB, MIB):
        one.pwrite(b"x" * MIB, (1 << 39) + at)
        two.pwrite(b"y" * MIB, (1 << 38) + at)
    assert all(now > then + 32000 for now, then in zip(kilobytes(), before, strict=True))
    two.trim(32 * MIB, 1 << 39)
    one.zero(32 * MIB, 1 << 38)
    assert all(now < then + 2000 for now, then in zip(kilobytes(), before, strict=True))
    assert one.pread(512, 1 << 39) == two.pread(512, 1 << 38) == bytes(512)


def test_reading_what_nobody_has_written_takes_no_memory(serve: Serve, connect: Connect) -> None:
    """Shared memory gets a page where it is only looked at."""
    server = serve("--workers=2", "memory", "1T")
    pids = workers_of(server)
    one, two = connect(server), connect(server)
    before = [shared_kilobytes(pid) for pid in pids]
    two.pwrite(b"x" * 65536, MIB)
    for at in range(0, 64 * MIB, 8 * MIB):
        expected = bytearray(8 * MIB)
        if at == 0:
            expected[MIB : MIB + 65536] = b"x" * 65536
        assert one.pread(8 * MIB, at) == expected
    for at in range(64 * MIB, 128 * MIB, 65536):
        assert two.pread(512, at) == bytes(512)
    assert all(shared_kilobytes(pid) < then + 2000 for pid, then in zip(pids, before, strict=True))


def test_copies_over_many_connections(serve: Serve, tmp_path: Path) -> None:
    """nbdcopy uses as many connections as it may, because the server offers multi-conn."""
    source, back = tmp_path / "source", tmp_path / "back"
    content = random.Random(4).randbytes(3 * MIB) + bytes(5 * MIB)
    source.write_bytes(content * 4)
    server = serve("--workers=2", "-v", "memory", "32M")
    support.run("nbdcopy", "--threads=4", "--connections=4", source, server.uri)
    support.run("nbdcopy", "--threads=4", "--connections=4", server.uri, back)
    assert back.read_bytes() == source.read_bytes()
    assert server.log().count("debug: connection from") >= 8


def test_fio_verifies_what_it_wrote_through_others(serve: Serve, tmp_path: Path) -> None:
    server = serve("--workers=2", "memory", "8M")
    job = [
        *("--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw", "--bs=4k", "--iodepth=16"),
        *(
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--numjobs=4",
            "--size=2M",
        ),
        *("--offset_increment=2M", "--name=job", "--minimal"),
    ]
    support.run("fio", *job)


# -- who gets whom ---------------------------------------------------------------------------------


def shares(handles: list[Any]) -> list[int]:
    found: dict[int, int] = {}
    for handle in handles:
        found[handle.get_size()] = found.get(handle.get_size(), 0) + 1
    return sorted(found.values())


def test_each_worker_has_its_share(sockdir: Path, connect: Connect, serve: Serve) -> None:
    """Of the clients that are there, however they came and went."""
    (sockdir / "who.py").write_text(WHO)
    server = serve("--workers=2", sockdir / "who.py")
    workers_of(server)
    handles = [connect(server) for _ in range(4)]
    assert shares(handles) == [2, 2]
    pids = children(server.process.pid)
    for handle in handles:
        handle.pread(512, 0)
    before = threads(pids[0])
    first = [handle for handle in handles if handle.get_size() == pids[0]]
    for handle in first:
        handle.shutdown()
    wait_until("two ends", lambda: threads(pids[0]) == before - 2)
    more = [connect(server) for _ in range(2)]
    assert {handle.get_size() for handle in more} == {pids[0]}


def test_a_crowd_that_comes_at_once(sockdir: Path, nbd: ModuleType, serve: Serve) -> None:
    (sockdir / "who.py").write_text(WHO)
    server = serve("--workers=3", sockdir / "who.py")
    handles = [nbd.NBD() for _ in range(30)]
    for handle in handles:
        handle.aio_connect_uri(server.uri)
    for handle in handles:
        while not handle.aio_is_ready():
            handle.poll(-1)
    assert shares(handles) == [10, 10, 10]
    for handle in handles:
        handle.shutdown()


def test_many_that_come_and_go(serve: Serve) -> None:
    """No descriptor stays behind, in no process; afterwards clients are served as before."""
    server = serve("--workers=2", "null", "1M")
    pids = [server.process.pid, *workers_of(server)]

    before = [descriptors(pid) for pid in pids]
    for _ in range(1000):
        visit(server.socket)
    wait_until("rest", lambda: [descriptors(pid) for pid in pids] == before)
    assert support.run("nbdinfo", "--size", server.uri).stdout == "1048576\n"


def test_connections_are_numbered_in_all(serve: Serve, connect: Connect) -> None:
    """So that the log tells them apart."""
    server = serve("--workers=2", "-v", "memory", "1M")
    for _ in range(4):
        connect(server)
    text = server.log()
    for number in range(2, 6):  # the first one was the test's own look whether it listens
        assert text.count(f"memory[{number}]: debug: connection from") == 1


# -- ends ------------------------------------------------------------------------------------------


@pytest.fixture
def slow(sockdir: Path, connect: Connect) -> Iterator[tuple[subprocess.Popen[bytes], list[Any]]]:
    """Two workers, each with a client whose reads past 0 wait at the FIFO `gate`."""
    os.mkfifo(sockdir / "gate")
    (sockdir / "p.py").write_text(SHARED)
    words = ["-f", "--workers=2", "-U", "s", "-P", "pid", "./p.py"]
    words += [f"notes={sockdir}/notes", f"gate={sockdir}/gate"]
    with running(*words, cwd=sockdir) as process:
        wait_for_file(sockdir / "pid", "\n")
        yield process, [connect(uri(sockdir / "s")) for _ in range(2)]


def open_gate(path: Path, count: int) -> None:
    """Let so many readers of a FIFO go, which all wait."""
    fd = os.open(path, os.O_WRONLY)
    os.close(fd)
    del count


def finish(handle: Any, cookie: int) -> None:
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_lets_running_requests_finish(
    slow: tuple[subprocess.Popen[bytes], list[Any]], nbd: ModuleType, number: int, sockdir: Path
) -> None:
    process, handles = slow
    pidfds = opened(children(process.pid))
    cookies = [(handle, handle.aio_pread(nbd.Buffer(512), 512)) for handle in handles]
    wait_for_file(sockdir / "notes", "pread\npread")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)  # it waits for the reads
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(sockdir / "s"))
    open_gate(sockdir / "gate", 2)
    for handle, cookie in cookies:
        finish(handle, cookie)
    assert process.wait(30) == 0
    assert_all_end(pidfds)
    notes = (sockdir / "notes").read_text().split()
    assert sorted(notes) == sorted(["pread", "close", "cleanup"] * 2)


def test_a_second_signal_ends_all_at_once(
    slow: tuple[subprocess.Popen[bytes], list[Any]], nbd: ModuleType, sockdir: Path
) -> None:
    process, handles = slow
    pidfds = opened(children(process.pid))
    for handle in handles:
        handle.aio_pread(nbd.Buffer(512), 512)
    wait_for_file(sockdir / "notes", "pread\npread")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    assert_all_end(pidfds)
    assert (sockdir / "notes").read_text().split() == ["pread", "pread"]


def test_a_worker_that_dies_while_it_is_to_end(
    slow: tuple[subprocess.Popen[bytes], list[Any]], nbd: ModuleType, sockdir: Path
) -> None:
    """What it was about to answer is lost: that is no end in order."""
    process, handles = slow
    pids = children(process.pid)
    for handle in handles:
        handle.aio_pread(nbd.Buffer(512), 512)
    wait_for_file(sockdir / "notes", "pread\npread")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(30) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_do_not_outlive_the_supervisor(
    slow: tuple[subprocess.Popen[bytes], list[Any]], nbd: ModuleType, sockdir: Path, number: int
) -> None:
    """They answer what they have begun, close their devices, clean up, and end."""
    process, handles = slow
    pidfds = opened(children(process.pid))
    cookie = handles[0].aio_pread(nbd.Buffer(512), 512)
    wait_for_file(sockdir / "notes", "pread")
    process.send_signal(number)
    assert process.wait(30) == -number
    open_gate(sockdir / "gate", 1)
    finish(handles[0], cookie)
    assert_all_end(pidfds)
    notes = (sockdir / "notes").read_text().split()
    assert sorted(notes) == sorted(["pread", *["close", "cleanup"] * 2])


def test_a_typed_interrupt_ends_all_in_order() -> None:
    """The terminal sends it to every process of the group: to the workers, it counts once."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        words = ["-f", "-U", "-", "--print-uri", "--workers=2", "memory", "1M"]
        os.execv(COMMAND[0], [*COMMAND, *words])
    try:
        text = b""
        while b"\n" not in text:
            text += os.read(terminal, 1000)
        pidfds = opened(children(pid))
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert_all_end(pidfds)
        assert b"error" not in text
    finally:
        os.close(terminal)


def test_a_typed_interrupt_is_the_commands_business() -> None:
    """The workers, too, go on for a command that does."""
    command = (
        "n=0; trap 'n=$((n + 1)); echo interrupted' INT; echo ready;"
        ' while test $n -lt 1; do read -r line; done; nbdinfo --size "$uri"; exit 8'
    )
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        words = ["-U", "-", "--workers=2", "memory", "1M", "--run", command]
        os.execv(COMMAND[0], [*COMMAND, *words])
    try:
        text = b""
        for seen, typed in ((b"ready", b"\x03"), (b"interrupted\r\n1048576", b"")):
            while seen not in text:
                text += os.read(terminal, 1000)
            text = text.split(seen, 1)[1]
            os.write(terminal, typed)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
    finally:
        os.close(terminal)


def test_a_plugin_that_stops_its_server_stops_all_workers(sockdir: Path, connect: Connect) -> None:
    (sockdir / "p.py").write_text(WHO + "def close(h): nbdkit.shutdown()\n")
    with running("-f", "--workers=3", "-U", "s", "-P", "pid", "./p.py", cwd=sockdir) as process:
        wait_for_file(sockdir / "pid", "\n")
        pidfds = opened(children(process.pid))
        assert len(pidfds) == 3
        connect(uri(sockdir / "s")).shutdown()
        assert process.wait(30) == 0
        assert_all_end(pidfds)


@pytest.mark.parametrize("kernel", ["pidfd", "old"])
def test_exit_with_parent(kernel: str, sockdir: Path) -> None:
    (sockdir / "p.py").write_text(SHARED)
    code = "from pynbdkit.cli.main import run; run()"
    if kernel == "old":
        code = f"import os; del os.pidfd_open; {code}"
    words = ["--exit-with-parent", "--workers=2", "-U", "s", "-P", "pid", "./p.py"]
    words += [f"notes={sockdir}/notes"]
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, *{words!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], cwd=sockdir) as process:
        pid = int(wait_for_file(sockdir / "pid", "\n"))
        pidfds = opened([pid, *children(pid)])
        process.kill()
        assert_all_end(pidfds)
    assert (sockdir / "notes").read_text().split() == ["cleanup"] * 2


def test_what_was_registered_runs_once_where_it_was(sockdir: Path) -> None:
    """atexit: of the supervisor's life in the supervisor, of a worker's in that worker."""
    (sockdir / "p.py").write_text(
        WHO
        + "import atexit, builtins\n"
        + "def note(text):\n"
        + f"    with builtins.open('{sockdir}/notes', 'a') as out: out.write(text + chr(10))\n"
        + "def get_ready(): note('get_ready'); atexit.register(note, 'ready')\n"
        + "def after_fork(): note('after_fork'); atexit.register(note, 'worker')\n"
        + "def cleanup(): note('cleanup')\n"
    )
    done = pynbdkit("-U", "-", "--workers=2", sockdir / "p.py", "--run", "exit 0")
    assert (done.returncode, done.stderr) == (0, "")
    notes = (sockdir / "notes").read_text().split()
    assert notes[0] == "get_ready"
    assert notes[-1] == "ready"
    assert sorted(notes[1:-1]) == sorted(["after_fork", "cleanup", "worker"] * 2)


# -- workers that die ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("memory", "16M"), ("file", "{disk}")])
def test_a_worker_that_is_killed_takes_nothing_along(
    words: tuple[str, ...], disk: Path, serve: Serve, nbd: ModuleType, connect: Connect
) -> None:
    """What it has answered is there, the other's clients notice nothing; it is replaced."""
    server = serve("--workers=2", *(word.format(disk=disk) for word in words))
    supervisor = server.process.pid
    pids = workers_of(server)
    before = {pid: descriptors(pid) for pid in pids}
    first = connect(server)
    wait_until("a client", lambda: sum(map(descriptors, pids)) > sum(before.values()))
    victim = next(pid for pid in pids if descriptors(pid) > before[pid])
    other = connect(server)
    answered: dict[int, bytes] = {}
    generator = random.Random(5)
    waiting: list[tuple[int, int, bytes]] = []
    with pytest.raises(nbd.Error):
        for turn in range(100_000):
            content = generator.randbytes(4096)
            at = turn % 512 * 4096
            other.pwrite(content, 3 * MIB)
            while len(waiting) >= 8:
                cookie, where, what = waiting.pop(0)
                while not first.aio_command_completed(cookie):
                    first.poll(-1)
                answered[where] = what
            waiting.append((first.aio_pwrite(nbd.Buffer.from_bytearray(content), at), at, content))
            if turn == 300:
                os.kill(victim, signal.SIGKILL)
    assert len(answered) > 250
    unsure = {at for _, at, _ in waiting} | {where}
    assert other.pread(4096, 3 * MIB) == content
    wait_for_workers(supervisor, 2, without=victim)
    wait_for_file(server.log_path, f"(process {victim}) was killed by signal 9, and with it 1 ")
    assert server.log().count("\n") == 1
    third = connect(server)
    for handle in (third, other):
        for at, content in answered.items():
            if at not in unsure:
                assert handle.pread(4096, at) == content


def test_a_worker_that_is_asked_to_end_is_replaced(
    slow: tuple[subprocess.Popen[bytes], list[Any]],
    nbd: ModuleType,
    sockdir: Path,
    connect: Connect,
) -> None:
    """In order: what it has begun is answered. The others go on."""
    process, handles = slow
    pids = children(process.pid)
    cookies = [(handle, handle.aio_pread(nbd.Buffer(512), 512)) for handle in handles]
    wait_for_file(sockdir / "notes", "pread\npread")
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(0.05)
    open_gate(sockdir / "gate", 2)
    for handle, cookie in cookies:
        finish(handle, cookie)
    wait_for_workers(process.pid, 2, without=pids[0])
    assert pids[1] in children(process.pid)
    wait_for_file(sockdir / "notes", "cleanup")
    assert connect(uri(sockdir / "s")).get_size() == 1 << 20
    process.terminate()
    assert process.wait(30) == 0


def test_clients_of_a_worker_that_never_took_them_go_to_another(
    sockdir: Path, serve: Serve, connect: Connect
) -> None:
    """It stands still, and then dies: who was handed to it has lost nothing."""
    (sockdir / "who.py").write_text(WHO)
    server = serve("-v", "--workers=2", sockdir / "who.py")
    pids = workers_of(server)
    os.kill(pids[0], signal.SIGSTOP)
    clients = []
    for _ in range(4):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(str(server.socket))
        clients.append(client)
    try:
        wait_until("two of them", lambda: sum(map(greeted, clients)) == 2)
    finally:
        os.kill(pids[0], signal.SIGKILL)
    for client in clients:
        assert client.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
        client.close()
    wait_until("a third one", lambda: server.log().count("is ready") == 3)
    workers_of(server)
    assert shares([connect(server) for _ in range(4)]) == [2, 2]


def greeted(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return len(client.recv(18, socket.MSG_PEEK)) == 18
    except BlockingIOError:
        return False
    finally:
        client.settimeout(30)


def test_while_all_workers_are_away_clients_wait(serve: Serve, connect: Connect) -> None:
    server = serve("--workers=2", "memory", "1M")
    for pid in workers_of(server):
        os.kill(pid, signal.SIGKILL)
    assert connect(server).get_size() == MIB
    wait_for_workers(server.process.pid, 2)


DYING = (
    WHO
    + """\
import builtins
def after_fork():
    if os.path.exists(os.environ["FLAG"]):
        {how}
"""
)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("os._exit(3)", "has ended with status 3"),
        ("os.kill(os.getpid(), 11)", "was killed by signal 11"),
        ("raise ValueError('no such luck')", "after_fork: ValueError: no such luck"),
    ],
)
def test_workers_that_die_at_once_are_given_up(how: str, says: str, sockdir: Path) -> None:
    """Once started, after ten of them; while it starts, at the first; status 1."""
    (sockdir / "p.py").write_text(DYING.replace("{how}", how))
    flag = sockdir / "flag"
    words = ["-f", "--workers=2", "-U", "s", "-P", "pid", "./p.py"]
    environment = {**os.environ, "FLAG": str(flag)}
    with (
        (sockdir / "log").open("wb") as log,
        running(*words, stderr=log, cwd=sockdir, env=environment) as process,
    ):
        wait_for_file(sockdir / "pid", "\n")
        flag.touch()
        pids = children(process.pid)
        pidfds = opened(pids)
        os.kill(pids[0], signal.SIGKILL)
        assert process.wait(30) == 1
        assert_all_end(pidfds)
    lines = (sockdir / "log").read_text().splitlines()
    assert "was killed by signal 9" in lines[0]
    assert says in lines[1]
    assert lines[-1].endswith("giving up")
    assert workers.TOO_OFTEN <= len(lines) <= workers.TOO_OFTEN + 1  # the first lived a while
    (sockdir / "s").unlink()
    done = pynbdkit(*words, cwd=sockdir, env=environment)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_clients_for_whom_there_is_no_descriptor_wait(serve: Serve) -> None:
    """In whichever process it is that has none left; the log says it once."""
    server = serve("--workers=2", "null", "1M")
    pids = [server.process.pid, *workers_of(server)]
    for pid in pids[1:]:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (10, 10))
    clients = []
    for _ in range(20):
        clients.append(socket.socket(socket.AF_UNIX))
        clients[-1].settimeout(30)
        clients[-1].connect(str(server.socket))
    wait_until("as many as can be", lambda: sum(map(greeted, clients)) == 8)
    resource.prlimit(pids[0], resource.RLIMIT_NOFILE, (descriptors(pids[0]), 100))
    wait_for_file(server.log_path, "Too many open files")
    for client in [client for client in clients if greeted(client)]:
        client.close()
        clients.remove(client)
    wait_until("those who waited", lambda: sum(map(greeted, clients)) == 8)
    resource.prlimit(pids[0], resource.RLIMIT_NOFILE, (100, 100))
    for client in [client for client in clients if greeted(client)]:
        client.close()
        clients.remove(client)
    wait_until("the last ones", lambda: sum(map(greeted, clients)) == 4)
    for client in clients:
        client.close()
    assert server.log().count("Too many open files") <= 3


NATIVE = """\
import pynbdkit
class Disk(pynbdkit.Plugin):
    forkable = True
    def get_ready(self): print("workers:", self.worker_count, flush=True)
    def open(self, session): ...
class Pass(pynbdkit.Filter):
    forkable = True
    def get_ready(self): print("and:", self.worker_count, flush=True)
"""


@pytest.mark.parametrize("words", [["./native.py"], ["python", "native.py"]])
def test_plugins_and_filters_know_how_many_there_will_be(words: list[str], sockdir: Path) -> None:
    (sockdir / "native.py").write_text(NATIVE)
    words = ["-U", "-", "--filter=./native.py", *words, "--run", "true"]
    for options, count in (["--workers=3"], 3), ([], 1):
        done = pynbdkit(*options, *words, cwd=sockdir)
        assert (done.stdout, done.stderr) == (f"workers: {count}\nand: {count}\n", "")


# -- services --------------------------------------------------------------------------------------


def test_in_the_background(sockdir: Path, connect: Connect) -> None:
    """The pidfile names the supervisor; nothing of the caller's is kept open, by no process."""
    command = [*COMMAND, "-U", "s", "-P", "pid", "--print-uri", "--workers=2", "memory", "1M"]
    done = subprocess.run(command, cwd=sockdir, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{uri(sockdir / 's')}\n"
    with daemon(sockdir / "pid") as pid:
        pids = children(pid)
        pidfds = opened(pids)
        assert len(pids) == 2
        for each in (pid, *pids):
            assert [os.readlink(f"/proc/{each}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
            assert os.readlink(f"/proc/{each}/cwd") == "/"
            assert os.getsid(each) == pid
            listening = f"socket:[{inode_of(sockdir / 's')}]"
            links = support.open_files(each)
            assert (listening in links) == (each == pid)
            assert pid == each or len(links) == 6  # stdio, the channel, and a pipe to wake it
        assert connect(done.stdout.strip()).get_size() == MIB
    assert_all_end(pidfds)


def inode_of(path: Path) -> int:
    for line in Path("/proc/net/unix").read_text().splitlines():
        if line.endswith((f" {path}", f" {path.name}")):
            return int(line.split()[6])
    raise AssertionError(path)


def test_messages_of_workers_go_where_the_servers_do(sockdir: Path) -> None:
    """--log=stderr keeps it open in the background, in every process."""
    command = [*COMMAND, "-U", "s", "-P", "pid", "--workers=2", "--log=stderr", "memory", "1M"]
    with (sockdir / "log").open("wb") as log:
        subprocess.run(command, cwd=sockdir, stderr=log, timeout=30, check=True)
    with daemon(sockdir / "pid") as pid:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(sockdir / "s"))
                client.sendall(b"\0\0\0\3" + b"this is no option")
                while client.recv(4096):
                    pass
        victim = children(pid)[0]
        os.kill(victim, signal.SIGKILL)
        text = wait_for_file(sockdir / "log", f"worker 1 (process {victim}) was killed by signal 9")
    assert "memory[1]: error: " in text
    assert "memory[2]: error: " in text


@pytest.mark.parametrize("how", ["exit 0", "exit 42", "kill -KILL $$"])
def test_the_status_is_the_commands(how: str, sockdir: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(sockdir)}
    command = f'echo $pid; cat /proc/$pid/task/$pid/children; echo; nbdinfo --size "$uri"; {how}'
    words = ["-U", "-", "--workers=2", "memory", "1M", "--run", command]
    with running(*words, env=environment, stdout=-1, stderr=-1) as process:
        out, _ = process.communicate(timeout=30)
        lines = out.decode().splitlines()
        assert lines[0] == str(process.pid)
        assert len(lines[1].split()) == 3  # the shell and two workers
        assert lines[2] == "1048576"
        assert process.returncode == {"exit 0": 0, "exit 42": 42}.get(how, 137)
    assert not list(sockdir.iterdir())


def test_a_server_that_ends_first_waits_for_the_command(sockdir: Path) -> None:
    (sockdir / "p.py").write_text(WHO + "def close(h): nbdkit.shutdown()\n")
    command = (
        'nbdinfo --size "$uri" >/dev/null; while nbdinfo "$uri" >/dev/null 2>&1; do :; done;'
        " echo after; exit 6"
    )
    done = pynbdkit("-U", "-", "--workers=2", sockdir / "p.py", "--run", command)
    assert (done.returncode, done.stdout, done.stderr) == (6, "after\n", "")


def test_a_signal_is_for_the_command(sockdir: Path) -> None:
    words = ["-U", "-", "--workers=2", "memory", "1M"]
    command = "trap 'exit 7' TERM; echo ready >&2; while :; do sleep 1000 & wait; done"
    with running(*words, "--run", command, stderr=-1) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        process.terminate()
        assert process.wait(30) == 7


def test_a_command_that_is_killed_before_it_runs() -> None:
    """By a Ctrl-C, say, before anybody looks at children: that is noticed when it is to run."""
    code = """
import os, signal
from pynbdkit.cli import background, main
really = background.on_signals
def on_signals(*arguments):
    shell = int(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read())
    os.kill(shell, signal.SIGKILL)
    os.waitid(os.P_PID, shell, os.WEXITED | os.WNOWAIT)
    really(*arguments)
background.on_signals = on_signals
main.run()
"""
    words = ["-U", "-", "--workers=2", "memory", "1M", "--run", "echo ran"]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, timeout=30, text=True)
    assert (done.returncode, done.stdout) == (137, "")


def test_workers_that_could_start_do_not_hold_up_the_end(sockdir: Path) -> None:
    """Of a start that another one of them has made fail."""
    (sockdir / "p.py").write_text(
        f"{WHO}def after_fork():\n    os.mkdir('{sockdir}/one')\n    1 / 0\n"
        "def after_fork(fail=after_fork):\n"
        "    try: fail()\n"
        "    except FileExistsError: pass\n"
    )
    done = pynbdkit("-U", "-", "--workers=4", sockdir / "p.py", "--run", "echo ran", timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("ZeroDivisionError") == done.stderr.count("\n") == 1


def test_the_command_does_not_run_when_a_worker_cannot_start(sockdir: Path) -> None:
    (sockdir / "p.py").write_text(WHO + "def after_fork(): 1 / 0\n")
    done = pynbdkit("-U", "-", "--workers=4", sockdir / "p.py", "--run", "echo ran; exit 5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("ZeroDivisionError") == done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [["-u", "nobody"], ["-u", "12345", "-g", "12345"], ["--swap"]])
def test_workers_are_of_the_user(options: list[str], sockdir: Path, connect: Connect) -> None:
    """All of them, and the ones that come later as well; their memory is locked, too."""
    need_root("becoming another user, and locking memory,")
    sockdir.chmod(0o777)
    words = ["-f", "-U", "s", "-P", "pid", "--unix-mode=666", *options, "--workers=2"]
    with running(*words, "memory", "1M", cwd=sockdir, stderr=subprocess.DEVNULL) as process:
        wait_for_file(sockdir / "pid", "\n")
        user = {"nobody": "65534", "--swap": "0"}.get(options[-1], options[-1])
        pids = children(process.pid)
        os.kill(pids[0], signal.SIGKILL)
        pids = wait_for_workers(process.pid, 2, without=pids[0])
        assert connect(uri(sockdir / "s")).get_size() == MIB
        assert connect(uri(sockdir / "s")).get_size() == MIB
        for pid in (process.pid, *pids):
            status = status_of(pid)
            assert status["Uid"].split() == status["Gid"].split() == [user] * 4
            assert (int(status["CapEff"], 16) == 0) == (user != "0")
            assert (int(status["VmLck"].split()[0]) > 0) == ("--swap" in options)
        process.terminate()
        assert process.wait(30) == 0


def test_sockets_that_were_inherited() -> None:
    """Socket activation: they are the supervisor's."""
    code = f"""
import os, socket
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0workers-%d" % os.getpid())
listener.listen()
print("workers-%d" % os.getpid(), flush=True)
os.dup2(os.dup(listener.fileno()), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv({COMMAND[0]!r}, {[*COMMAND, "--workers=2", "memory", "1M"]!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for client in clients:
            client.settimeout(30)
            client.connect(f"\0{name}")
            assert client.recv(18)[:8] == b"NBDMAGIC"
        assert len(children(process.pid)) == 2
        process.terminate()
        assert process.wait(30) == 0
        for client in clients:
            client.close()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    (tmp_path / "certificates").mkdir()
    return Certificates(tmp_path / "certificates")


def test_a_hangup_reads_tls_files_again_in_all_workers(
    tmp_path: Path, certificates: Certificates, sockdir: Path
) -> None:
    """And in those that come later; what is wrong is said once."""
    for name in ("one", "two"):
        certificates._authority(name)
        certificates.issue(name, "server", "cn = localhost", "dns_name = localhost")
    mine = tmp_path / "mine"
    shutil.copytree(certificates["one"], mine)
    words = ["-4", "-p", "0", "-f", "--print-uri", "--tls=require", "--workers=2", "-v"]
    words += [f"--tls-certificates={mine}", "memory", "1M"]
    with (
        (sockdir / "log").open("wb") as log,
        running(*words, stdout=-1, stderr=log) as process,
    ):
        assert process.stdout is not None
        where = process.stdout.readline().decode().partition("?")[0]

        def trusted_by(name: str) -> list[str]:
            """What as many clients get as there are workers, and one more."""
            out = []
            for _ in range(3):
                words = ["nbdinfo", "--size", f"{where}?tls-certificates={certificates[name]}"]
                out.append(support.run(*words, check=False).stdout.strip())
            return out

        assert trusted_by("one") == ["1048576"] * 3
        for each in certificates["two"].iterdir():
            shutil.copy(each, mine)
        process.send_signal(signal.SIGHUP)
        wait_until("3 times", lambda: (sockdir / "log").read_text().count("were read again") == 3)
        assert (trusted_by("one"), trusted_by("two")) == ([""] * 3, ["1048576"] * 3)
        (mine / "server-cert.pem").write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        wait_for_file(sockdir / "log", "TLS credentials are not replaced: ")
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
            wait_for_workers(process.pid, 2, without=pid)
        assert (trusted_by("one"), trusted_by("two")) == ([""] * 3, ["1048576"] * 3)
        assert (sockdir / "log").read_text().count("are not replaced") == 1
        process.terminate()
        assert process.wait(30) == 0


def test_each_worker_has_an_event_loop_of_its_own(
    serve: Serve, connect: Connect, sockdir: Path
) -> None:
    (sockdir / "loops.py").write_text(COROUTINES)
    server = serve("--workers=2", "python", sockdir / "loops.py")
    handles = [connect(server) for _ in range(4)]
    found = [int.from_bytes(handle.pread(8, 0), "big") for handle in handles]
    assert found == [handle.get_size() for handle in handles]
    assert [found.count(pid) for pid in set(found)] == [2, 2]


# -- refusals --------------------------------------------------------------------------------------

SCRIPT = WHO.replace("forkable = True\n", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["./not.py"], "the plugin not is for one process (it is not declared forkable)"),
        (["python", "not.py"], "the plugin python is for one process"),
        (["./odd.py"], "odd: forkable is 'yes', not True or False"),
        (["./serial.py"], "the plugin serial wants serialize_all_requests, which several"),
        (["./thread.py"], "a thread runs already"),
        (["./ready.py"], "ready: get_ready is async def, and an event loop cannot be shared"),
        (["cc", ROOT / "tests/native/disk.c"], "plugin cc is for one process"),
        (["--filter=cow", "memory", "1M"], "the filter cow is for one process"),
        (["--filter=limit", "memory", "1M"], "the filter limit is for one process"),
        (["--filter=exitlast", "memory", "1M"], "the filter exitlast is for one process"),
        (["--filter=log", "memory", "1M"], "the filter log is for one process"),
        (["memory", "32T"], "size=35184372088832: too large to be shared by several processes"),
        (["data", "1*100000000"], "a disk of over 16T, or with more than 64M of data"),
        (["-s", "memory", "1M"], "-s and --workers exclude each other"),
    ],
)
def test_what_several_processes_cannot_do(
    words: list[str | Path], says: str, sockdir: Path
) -> None:
    """One line, the way out, status 1; nothing listens."""
    (sockdir / "not.py").write_text(SCRIPT)
    (sockdir / "odd.py").write_text(f"{SCRIPT}forkable = 'yes'\n")
    (sockdir / "serial.py").write_text(f"{SCRIPT}forkable = True\n".replace("thread_model", "_"))
    (sockdir / "thread.py").write_text(
        f"{WHO}def get_ready():\n    import threading, time\n"
        "    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"
    )
    (sockdir / "ready.py").write_text(f"{COROUTINES}async def get_ready(): pass\n")
    where = [] if words[0] == "-s" else ["-U", "s"]
    done = pynbdkit("--workers=2", *where, *words, "--run" if where else "-f", "true", cwd=sockdir)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("count", ["-1", "1025", "two", ""])
def test_numbers_that_are_none(count: str) -> None:
    done = pynbdkit("-U", "-", f"--workers={count}", "memory", "1M", "--run", "true")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--workers" in done.stderr
    with pytest.raises(UsageError, match="number, or auto"):
        workers.number_of(count)


@pytest.mark.parametrize("text", ["0", "auto"])
def test_as_many_as_processors(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 7})
    assert workers.number_of(text) == 3
    assert (workers.number_of(None), workers.number_of("1"), workers.number_of("7")) == (1, 1, 7)


@pytest.mark.parametrize("words", [[], ["--workers=1"], ["--workers=auto"]])
def test_one_worker_is_no_other_process(words: list[str]) -> None:
    cpu = min(os.sched_getaffinity(0))
    command = 'cat /proc/$pid/task/*/children | wc -w; nbdinfo --size "$uri"'
    done = subprocess.run(
        [*COMMAND, "-U", "-", *words, "memory", "1M", "--run", command],
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.split() == ["1", "1048576"], done.stderr  # the command


def test_what_may_be_forked_is_dumped(sockdir: Path) -> None:
    (sockdir / "who.py").write_text(WHO)
    (sockdir / "not.py").write_text(SCRIPT)
    for words, answer in (
        (["memory"], "yes"),
        (["file"], "yes"),
        ([f"{sockdir}/who.py"], "yes"),
        (["python", f"{sockdir}/who.py"], "yes"),
        ([f"{sockdir}/not.py"], "no"),
        (["python"], "no"),
    ):
        text = pynbdkit(*words, "--dump-plugin").stdout
        assert ("\nforkable=yes\n" in text) == (answer == "yes")
        assert "forkable=no" not in text
        assert "has_forkable" not in text
