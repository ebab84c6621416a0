"""Take away what a server needs, and see what it does: `make crash`, or one fault by its name.

    python campaigns/faults.py [--rounds 20] [NAME ...]

Each fault is done for real where that is possible: a filesystem that is full, a device that fails,
a process without descriptors, memory or threads. What has to come of it: the client gets the right
error, the operator a line in the log, everybody else is served as before, all that was answered is
there, and when the cause is gone, so are the errors. A fault that leaves something else behind
raises AssertionError.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from ledger import SECTOR, Ledger, payload
from writers import LOADS, Load, Writers

import support
from block_device import attached, mounted, needs
from command import status_of, wait_until
from raw import CACHE, FLUSH, READ, TRIM, WRITE, ZEROES, Raw

MIB = 1 << 20
BLOCK = 64 << 10
LARGEST = 64 * MIB
"""The largest read or write."""
OK, EIO, ENOMEM, ENOSPC = 0, 5, 12, 28
"""The protocol's numbers."""
FUA = 1
NOBODY = 61234
"""A user that no other process belongs to."""
THREADS = 12
"""And how many threads it may have."""


class Place:
    """A folder, and the servers and clients in it; all end with it, and end well."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self._count = 0

    def serve(
        self, *words: str | Path, shell: str = "", prefix: tuple[str, ...] = ()
    ) -> support.ServerProcess:
        """Our server. `shell`: redirections that it gets; `prefix`: a command that starts it."""
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        folder.chmod(0o777)
        command = [*prefix, sys.executable, "-m", "pynbdkit"]
        if shell:
            command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
        server = support.ServerProcess(folder, words, command)
        self.stack.callback(self._end, server)
        return server

    @staticmethod
    def _end(server: support.ServerProcess) -> None:
        status = server.stop()
        assert status == 0, f"exit status {status}: {server.log()}"

    def client(self, server: support.ServerProcess) -> Raw:
        """A connection."""
        return self.stack.enter_context(Raw(str(server.socket)))


def ask(
    client: Raw, kind: int, offset: int = 0, count: int = 0, flags: int = 0, data: bytes = b""
) -> int:
    """Do one request; returns the protocol's error. Reads are compared with `data`."""
    client.ask(kind, 7, offset, count, flags, data if kind == WRITE else b"")
    cookie, error, found = client.simple(count if kind == READ else 0)
    assert cookie == 7
    if kind == READ and not error:
        assert found == data, f"something else is at {offset}"
    return error


def block(number: int) -> bytes:
    """The content of the block of that number."""
    first = number * BLOCK // SECTOR
    return bytes(payload(number + 1, first, first + BLOCK // SECTOR))


def lines(server: support.ServerProcess, text: str) -> int:
    """How many lines of the log have a text."""
    return sum(text in line for line in server.log().splitlines())


def make_file(path: Path, size: int) -> None:
    """A hole of so many bytes."""
    with path.open("wb") as stream:
        stream.truncate(size)


# -- space -----------------------------------------------------------------------------------------


def _no_space(place: Place, root: Path, size: int) -> str:
    """Write to a disk in `root` until there is no space; then there is again."""
    disk, ballast = root / "disk", root / "ballast"
    make_file(disk, size)
    ballast.write_bytes(bytes(MIB))
    server = place.serve("file", disk)
    client, other = place.client(server), place.client(server)
    written = []
    for number in range(size // BLOCK):
        error = ask(client, WRITE, number * BLOCK, BLOCK, number % 2 * FUA, block(number))
        if error:
            break
        written.append(number)
    assert error == ENOSPC, f"error {error} after {len(written)} blocks"
    assert lines(server, "pwrite: offset"), server.log()
    assert lines(server, "No space left on device"), server.log()
    assert ask(client, WRITE, number * BLOCK, BLOCK, FUA, block(number)) == ENOSPC
    assert ask(client, FLUSH) == OK, "no space is no lost page: a flush has nothing to say of it"
    for done in written:
        assert ask(other, READ, done * BLOCK, BLOCK, 0, block(done)) == OK

    ledger = Ledger(disk.read_bytes())
    load = Load(3, 16, {"write": 30, "write, fua": 50, "zero": 5, "zero, fua": 5, "flush": 10})
    full = Writers(support.libnbd(), server.uri, ledger, random.Random(3), load)
    full.run(lambda: full.sent < 400)
    assert not full.broken
    assert {number for _, number in full.errors} == {ENOSPC}, full.errors[:5]
    assert not (problems := ledger.check(disk.read_bytes(), power=False)), problems

    ballast.unlink()
    assert ask(client, WRITE, number * BLOCK, BLOCK, FUA, block(number)) == OK
    assert ask(other, READ, number * BLOCK, BLOCK, 0, block(number)) == OK
    assert ask(client, FLUSH) == OK
    return f"{len(written)} writes, then ENOSPC; {len(full.errors)} of 400 at once; then space"


def full_tmpfs(place: Place) -> str:
    """The filesystem (in memory) is full."""
    support.need_root("mounting a filesystem")
    with _tmpfs(place.folder / "full", "4m") as root, ExitStack() as stack:
        return _no_space(Place(place.folder, stack), root, 8 * MIB)


def full_ext4(place: Place) -> str:
    """The filesystem (ext4, on a loop device) is full."""
    needs("mkfs.ext4")
    image = place.folder / "image"
    make_file(image, 16 * MIB)
    support.run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-O", "^has_journal", image)
    with mounted(image, place.folder / "mnt", "loop") as root, ExitStack() as stack:
        return _no_space(Place(place.folder, stack), root, 24 * MIB)


@contextmanager
def _tmpfs(point: Path, size: str) -> Iterator[Path]:
    point.mkdir()
    support.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", point)
    try:
        yield point
    finally:
        support.run("umount", "-l", point)


def file_size_limit(place: Place) -> str:
    """The process may not make files as large as the disk (RLIMIT_FSIZE)."""
    disk = place.folder / "disk"
    make_file(disk, 4 * MIB)
    server = place.serve("file", disk, prefix=("prlimit", f"--fsize={MIB}", "--"))
    client = place.client(server)
    assert ask(client, WRITE, 0, BLOCK, FUA, block(0)) == OK
    assert ask(client, WRITE, 2 * MIB, BLOCK, FUA, block(32)) == ENOSPC
    assert lines(server, "File too large"), server.log()
    assert ask(client, WRITE, BLOCK, BLOCK, 0, block(1)) == OK
    assert ask(client, FLUSH) == OK
    return "EFBIG is ENOSPC to the client, no signal ends the server"


# -- errors of the device --------------------------------------------------------------------------


def error_filter(place: Place) -> str:
    """Every request fails, as long as a file is there."""
    disk, trigger = place.folder / "disk", place.folder / "trigger"
    make_file(disk, MIB)
    words = ("error-rate=100%", f"error-file={trigger}")
    server = place.serve("--filter=error", "file", disk, *words)
    client = place.client(server)
    assert ask(client, WRITE, 0, BLOCK, FUA, block(0)) == OK
    trigger.touch()
    names = {READ: "pread", WRITE: "pwrite", TRIM: "trim", ZEROES: "zero", CACHE: "cache"}
    for kind, name in names.items():
        assert ask(client, kind, BLOCK, BLOCK, 0, block(1)) == EIO
        line = f"{name}: offset {BLOCK}, count {BLOCK}: injecting EIO error into {name}"
        assert lines(server, line) == 1, server.log()
    trigger.unlink()
    for kind in (WRITE, READ, CACHE, TRIM, ZEROES):
        assert ask(client, kind, BLOCK, BLOCK, 0, block(1)) == OK
    assert ask(client, READ, 0, BLOCK, 0, block(0)) == OK
    return "five kinds of requests got EIO and a line each, then went on"


def bad_device(place: Place) -> str:
    """A block device fails for a while: what was written meanwhile is lost, and stays known so."""
    needs()
    trigger = place.folder / "trigger"
    below = place.serve(
        "--filter=error", "memory", "8M", "error-rate=100%", f"error-file={trigger}"
    )
    with attached(below.uri, place.folder / "fuse") as device, ExitStack() as stack:
        inner = Place(place.folder / "inner", stack)
        inner.folder.mkdir()
        server = inner.serve("file", device)
        client, other = inner.client(server), inner.client(server)
        assert ask(client, WRITE, 0, BLOCK, FUA, block(0)) == OK
        trigger.touch()
        assert ask(client, READ, 4 * MIB, BLOCK) == EIO
        assert lines(server, f"pread: offset {4 * MIB}, count {BLOCK}: Input/output error") == 1
        assert ask(client, READ, 0, BLOCK, 0, block(0)) == OK, "it is in the page cache"
        assert ask(client, WRITE, 2 * MIB, BLOCK, 0, block(32)) == OK, "so is this"
        assert ask(client, FLUSH) == EIO
        trigger.unlink()
        for each in (client, other, inner.client(server)):
            assert ask(each, FLUSH) == EIO, "the device works again, but the page is lost"
            assert ask(each, WRITE, MIB, BLOCK, FUA, block(16)) == EIO
        assert lines(server, "an earlier sync of this file failed"), server.log()
        assert ask(client, READ, 4 * MIB, BLOCK, 0, bytes(BLOCK)) == OK
        server.stop()
        again = inner.client(inner.serve("file", device))
        assert ask(again, WRITE, 2 * MIB, BLOCK, FUA, block(32)) == OK
        assert ask(again, FLUSH) == OK
        assert ask(again, READ, 0, BLOCK, 0, block(0)) == OK
    return "EIO to reads and flush; no later flush succeeds until the restart"


# -- the file changes ------------------------------------------------------------------------------


def truncated(place: Place) -> str:
    """Somebody truncates the file while it is served."""
    disk = place.folder / "disk"
    disk.write_bytes(b"".join(map(block, range(16))))
    server = place.serve("file", disk)
    client = place.client(server)
    os.truncate(disk, 4 * BLOCK + 100)
    assert ask(client, READ, 3 * BLOCK, BLOCK, 0, block(3)) == OK
    assert ask(client, READ, 4 * BLOCK, BLOCK) == EIO
    assert ask(client, READ, 8 * BLOCK, BLOCK) == EIO
    assert lines(server, "it has been truncated") == 2, server.log()
    assert ask(client, CACHE, 8 * BLOCK, BLOCK) == OK
    assert ask(client, TRIM, 8 * BLOCK, BLOCK) == OK
    assert ask(client, FLUSH) == OK
    assert ask(client, WRITE, 8 * BLOCK, BLOCK, FUA, block(80)) == OK
    assert ask(client, READ, 8 * BLOCK, BLOCK, 0, block(80)) == OK
    assert ask(client, READ, 5 * BLOCK, BLOCK, 0, bytes(BLOCK)) == OK
    assert ask(client, ZEROES, 12 * BLOCK, BLOCK, FUA) == OK
    assert ask(client, READ, 12 * BLOCK, BLOCK, 0, bytes(BLOCK)) == OK, "zeros that were answered"

    os.truncate(disk, 16 * BLOCK)
    ledger = Ledger(bytes(16 * BLOCK))
    writers = Writers(support.libnbd(), server.uri, ledger, random.Random(5), LOADS["mixed"])
    ended = threading.Event()

    def truncate() -> None:
        while not ended.wait(0.002):
            os.truncate(disk, random.randrange(16 * BLOCK))
            os.truncate(disk, 16 * BLOCK)

    thread = threading.Thread(target=truncate)
    thread.start()
    try:
        writers.run(lambda: writers.sent < 3000)
    finally:
        ended.set()
        thread.join()
    assert not writers.broken
    assert not writers.errors, writers.errors[:5]
    with place.client(server) as last:
        os.truncate(disk, 16 * BLOCK)
        assert ask(last, WRITE, 0, BLOCK, FUA, block(0)) == OK
        assert ask(last, READ, 0, BLOCK, 0, block(0)) == OK
    return "EIO beyond the end, writes make the file longer again; 3000 requests meanwhile"


# -- the process's limits --------------------------------------------------------------------------


@contextmanager
def limit(server: support.ServerProcess, what: int, value: int) -> Iterator[None]:
    """Give a running server a limit (setrlimit(2)) for a while."""
    pid = server.process.pid
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, what, before)


def descriptors(place: Place) -> str:
    """More clients than there are descriptors for."""
    disk = place.folder / "disk"
    make_file(disk, 8 * MIB)
    server = place.serve("--filter=delay", "file", disk, "wdelay=1ms")
    folder = Path(f"/proc/{server.process.pid}/fd")
    clients = [place.client(server)]
    assert ask(clients[0], WRITE, 0, BLOCK, FUA, block(0)) == OK
    before = len(os.listdir(folder))
    with limit(server, resource.RLIMIT_NOFILE, before + 20):
        waiting = []
        while True:
            client = Raw(str(server.socket), go=False)
            client.sock.settimeout(1)
            try:
                client.receive(18)
                client.sock.settimeout(20)
                client.send((3).to_bytes(4))
                client.option(7, bytes(6))
                while (kind := client.reply()[1]) == 3:
                    pass
                if kind != 1:
                    waiting.append(client)  # there was a descriptor for it, but none for the file
                    break
                clients.append(client)
            except (TimeoutError, EOFError, ConnectionResetError):
                waiting.append(client)
                break
            assert len(clients) < 100
        assert len(clients) > 5
        assert lines(server, "Too many open files"), server.log()
        writers = ledger = None
        for number, client in enumerate(clients):  # all at once, in threads, each with a sync
            for place_of in range(8):
                data = block(number * 8 + place_of)[:4096]
                offset = (number * 8 + place_of) * 4096
                client.ask(WRITE, place_of, offset, 4096, FUA, data)
        del writers, ledger
        for client in clients:
            assert sorted(client.simple()[:2] for _ in range(8)) == [(n, OK) for n in range(8)]
        for number in range(len(clients) * 8):
            data = block(number)[:4096]
            assert ask(clients[-1], READ, number * 4096, 4096, 0, data) == OK
        for client in clients[5:]:
            client.close()
        for client in waiting:
            client.close()
        wait_until("descriptors", lambda: len(os.listdir(folder)) < before + 16)
        with Raw(str(server.socket)) as late:
            assert ask(late, READ, 0, 4096, 0, block(0)[:4096]) == OK
    return f"{len(clients)} clients were served, one was not; after some had gone, a new one was"


def memory(place: Place) -> str:
    """A client asks for more than there is memory for (RLIMIT_AS)."""
    disk = place.folder / "disk"
    make_file(disk, LARGEST)
    server = place.serve("file", disk)
    other = place.client(server)
    assert ask(other, WRITE, 0, BLOCK, FUA, block(0)) == OK
    answers = []
    for kind in (READ, WRITE):
        client = place.client(server)
        assert ask(client, READ, 0, BLOCK, 0, block(0)) == OK
        size = int(status_of(server.process.pid)["VmSize"].split()[0]) * 1024
        with limit(server, resource.RLIMIT_AS, size + 8 * MIB):
            before = lines(server, "emory")
            answers.append(_too_large(client, kind))
            wait_until("a line in the log", lambda at=before: lines(server, "emory") > at)
            assert ask(other, WRITE, BLOCK, BLOCK, FUA, block(1)) == OK
            assert ask(other, READ, BLOCK, BLOCK, 0, block(1)) == OK
    last = place.client(server)
    assert ask(last, READ, 0, BLOCK, 0, block(0)) == OK
    last.ask(READ, 9, 0, 16 * MIB)
    assert last.simple(16 * MIB)[1] == OK
    return f"read of 64 MiB: {answers[0]}; write: {answers[1]}"


def _too_large(client: Raw, kind: int) -> str:
    try:
        client.ask(kind, 9, 0, LARGEST, 0, bytes(LARGEST) if kind == WRITE else b"")
        error = client.simple(LARGEST)[1]
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return "closed"
    assert error == ENOMEM, error
    return "ENOMEM"


def threads(place: Place) -> str:
    """The system starts no more threads (RLIMIT_NPROC)."""
    support.need_root("being a user of its own")
    disk = place.folder / "disk"
    make_file(disk, MIB)
    os.chmod(disk, 0o666)
    place.folder.chmod(0o755)
    user = (
        "prlimit", f"--nproc={THREADS}", "--", "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}",
        "--clear-groups", "--",
    )  # fmt: skip
    server = place.serve("--filter=delay", "file", disk, "wdelay=1ms", prefix=user)
    first = place.client(server)
    assert ask(first, WRITE, 0, BLOCK, FUA, block(0)) == OK
    clients = []
    while True:
        client = Raw(str(server.socket), go=False)
        try:
            client.receive(18)
        except (EOFError, ConnectionResetError):
            client.close()
            break
        clients.append(client)
        assert len(clients) < THREADS
    assert lines(server, "cannot serve a client: can't start new thread") == 1, server.log()
    # More requests than it can have workers for: those that it has do them.
    for number in range(16):
        first.ask(WRITE, number, number * BLOCK, BLOCK, FUA, block(number))
    answers = sorted(first.simple()[:2] for _ in range(16))
    assert answers == [(number, OK) for number in range(16)]
    for number in range(16):
        assert ask(first, READ, number * BLOCK, BLOCK, 0, block(number)) == OK
    for client in clients:
        client.close()
    wait_until("a thread for another client", lambda: _is_served(server))
    return f"{len(clients) + 1} clients, one refused with a line, the one at work went on"


def _is_served(server: support.ServerProcess) -> bool:
    try:
        with Raw(str(server.socket)) as client:
            return ask(client, READ, 0, BLOCK, 0, block(0)) == OK
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return False


# -- the log ---------------------------------------------------------------------------------------


def _failing(place: Place, shell: str) -> support.ServerProcess:
    disk = place.folder / "disk"
    disk.write_bytes(block(0) * 16)
    words = ("error-pread-rate=100%",)
    server = place.serve("--filter=error", "file", disk, *words, shell=shell)
    client = place.client(server)
    for _ in range(2000):
        assert ask(client, READ, 0, 512) == EIO
    assert ask(client, WRITE, 0, BLOCK, FUA, block(1)) == OK
    assert disk.read_bytes() == block(1) + block(0) * 15, "a message has been written to the disk"
    place.client(server)
    return server


def log_full(place: Place) -> str:
    """Messages go to a full disk."""
    _failing(place, "2>/dev/full")
    return "2000 errors that nobody could read, 2001 answers"


def log_closed(place: Place) -> str:
    """There is no stderr."""
    _failing(place, "2>&-")
    return "2000 errors without stderr, 2001 answers, the disk is as it should be"


def log_reader_gone(place: Place) -> str:
    """Messages go to a pipe that nobody reads any more."""
    pipe = place.folder / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    threading.Timer(0.2, os.close, [reader]).start()
    _failing(place, f"2>'{pipe}'")
    return "2000 errors into a broken pipe, 2001 answers"


def log_full_for_a_while(place: Place) -> str:
    """The log is on a disk that is full, and then is not."""
    support.need_root("mounting a filesystem")
    with _tmpfs(place.folder / "full", "64k") as root, ExitStack() as stack:
        inner = Place(place.folder / "inner", stack)
        inner.folder.mkdir()
        server = _failing(inner, f"2>>'{root}/log'")
        size = (root / "log").stat().st_size
        (root / "log").write_bytes(b"")
        assert ask(inner.client(server), READ, 512, 512) == EIO
        wait_until("a line", lambda: b"offset 512," in (root / "log").read_bytes())
    return f"{size} bytes of log, then full, then lines again"


def log_filter_full(place: Place) -> str:
    """The log filter's file is on a full disk."""
    support.need_root("mounting a filesystem")
    with _tmpfs(place.folder / "full", "64k") as root, ExitStack() as stack:
        inner = Place(place.folder / "inner", stack)
        inner.folder.mkdir()
        server = inner.serve("--filter=log", "memory", "1M", f"logfile={root}/log")
        client = inner.client(server)
        for number in range(2000):
            data = bytes([number % 256]) * 512
            assert ask(client, WRITE, 0, 512, 0, data) == OK
            assert ask(client, READ, 0, 512, 0, data) == OK
        assert lines(server, "No space left on device; entries are lost") == 1, server.log()
    return "4000 requests, one line that entries are lost"


# -- plugins ---------------------------------------------------------------------------------------

RAISERS = """
import asyncio
class Own(BaseException): pass
class Mute(Exception):
    def __str__(self): raise ValueError("no text")
    __repr__ = __str__
class MuteBase(BaseException):
    def __str__(self): raise KeyboardInterrupt
    __repr__ = __str__
def deep(n=0): return deep(n + 1) + 1
def huge(): return bytearray(1 << 60)
def interrupt(): raise KeyboardInterrupt
def leave(): raise SystemExit(0)
def leave_too(): raise SystemExit("bye")
def close(): raise GeneratorExit
def end(): next(iter(()))
def cancel(): raise asyncio.CancelledError
def own(): raise Own
def mute(): raise Mute
def mute_base(): raise MuteBase
def plain(): raise OSError
def strange(): raise OSError("one", "two")
def negative(): raise OSError(-5, "negative")
def beyond(): raise OSError(1 << 70, "beyond")
def surrogate(): raise RuntimeError("line\\none \\udc80 \\x1b[31m")
def group(): raise BaseExceptionGroup("many", [KeyboardInterrupt(), ValueError()])
def check(): assert False
WAYS = [deep, huge, interrupt, leave, leave_too, close, end, cancel, own, mute, mute_base, plain,
        strange, negative, beyond, surrogate, group, check]
def raise_by(offset):
    if offset % 4096 == 512:
        WAYS[offset // 4096]()
def pick(name):
    return {way.__name__: way for way in WAYS}.get(name, lambda: None)
"""

DEVICE = """
from pynbdkit import Device, Plugin, Fua
class D(Device):
    blocking = BLOCKING
    data = bytearray(1 << 20)
    def get_size(self): return 1 << 20
    def can_fua(self): return Fua.NATIVE
    def can_multi_conn(self): return True
    def pread(self, count, offset, flags):
        raise_by(offset)
        return bytes(self.data[offset:offset + count])
    def pwrite(self, buf, offset, flags):
        raise_by(offset)
        self.data[offset:offset + len(buf)] = buf
    def pwrite_group(self, writes):
        for buf, offset in writes: self.pwrite(buf, offset, 0)
        return True
    def flush(self, flags): pass
    def trim(self, count, offset, flags): raise_by(offset)
    def zero(self, count, offset, flags):
        raise_by(offset)
        self.data[offset:offset + count] = bytes(count)
    def cache(self, count, offset, flags): raise_by(offset)
    def extents(self, count, offset, flags):
        raise_by(offset)
        return [(offset, count, 0)]
class P(Plugin):
    name = "raiser"
    def open(self, session):
        pick(session.export_name)()
        return D()
    def list_exports(self, readonly, is_tls): interrupt()
"""

SCRIPT = """
import nbdkit
API_VERSION = 2
data = bytearray(1 << 20)
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(readonly): pick(nbdkit.export_name())(); return 1
def get_size(h): return 1 << 20
def can_fua(h): return nbdkit.FUA_NATIVE
def can_multi_conn(h): return True
def can_cache(h): return nbdkit.CACHE_NATIVE
def pread(h, buf, offset, flags):
    raise_by(offset)
    buf[:] = data[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags):
    raise_by(offset)
    data[offset:offset + len(buf)] = buf
def flush(h, flags): pass
def trim(h, count, offset, flags): raise_by(offset)
def zero(h, count, offset, flags):
    raise_by(offset)
    data[offset:offset + count] = bytes(count)
def cache(h, count, offset, flags): raise_by(offset)
def extents(h, count, offset, flags):
    raise_by(offset)
    return [(offset, count, 0)]
"""
WAYS = 18


def _raises(place: Place, body: str, word: str) -> str:
    """Every request in every way, with good ones around it; then opens, then all at once."""
    script = place.folder / "raiser.py"
    script.write_text(RAISERS + body)
    server = place.serve(*([word] if word else []), script)
    client = place.client(server)
    failed = 0
    for way in range(WAYS):
        bad, good = way * 4096 + 512, way * 4096
        for kind in (READ, WRITE, TRIM, ZEROES, CACHE):
            for flags in (0, FUA) if kind not in (READ, CACHE) else (0,):
                data = bytes([way + 1]) * 512
                assert ask(client, WRITE, good, 512, 0, data) == OK
                error = ask(client, kind, bad, 512, flags, bytes(512))
                assert error in (EIO, ENOMEM), f"way {way}, request {kind}: error {error}"
                assert ask(client, READ, good, 512, 0, data) == OK
                failed += 1
    _raises_at_once(client)
    for name in ("interrupt", "leave", "close", "mute", "mute_base", "deep", "group", "cancel"):
        refused = Raw(str(server.socket), go=False)
        refused.receive(18)
        refused.send((3).to_bytes(4))
        refused.option(7, len(name).to_bytes(4) + name.encode() + bytes(2))
        kind = refused.reply()[1]
        assert kind >> 31, f"{name}: reply {kind}"
        refused.close()
    assert ask(place.client(server), READ, 0, 512, 0, bytes([1]) * 512) == OK
    text = server.log()
    assert text.count("error:") >= failed, text[-3000:]
    assert "Exception in thread" not in text, text[-3000:]
    return f"{failed} requests failed in {WAYS} ways, {WAYS} of them within a group"


def _raises_at_once(client: Raw) -> None:
    """Writes with FUA that are made stable together, one of which raises."""
    for way in range(WAYS):
        offsets = (way * 4096, way * 4096 + 512, way * 4096 + 1024)
        data = bytes([way + 1]) * 512
        client.send(b"".join(Raw.request(WRITE, at, at, 512, FUA) + data for at in offsets))
        answers = dict(client.simple()[:2] for _ in offsets)
        assert answers[offsets[1]] in (EIO, ENOMEM), f"way {way}: {answers}"
        for good in (offsets[0], offsets[2]):
            assert answers[good] == OK, f"way {way}: {answers}"
            assert ask(client, READ, good, 512, 0, data) == OK


def raises_in_reader(place: Place) -> str:
    """A plugin raises everything there is, in the thread that reads requests."""
    return _raises(place, DEVICE.replace("BLOCKING", "False"), "")


def raises_in_threads(place: Place) -> str:
    """The same, in worker threads."""
    return _raises(place, DEVICE.replace("BLOCKING", "True"), "")


def raises_in_script(place: Place) -> str:
    """The same, in a script that was written for nbdkit."""
    return _raises(place, SCRIPT, "python")


FAULTS: dict[str, Callable[[Place], str]] = {
    function.__name__: function
    for function in (
        full_tmpfs, full_ext4, file_size_limit, error_filter, bad_device, truncated, descriptors,
        memory, threads, log_full, log_closed, log_reader_gone, log_full_for_a_while,
        log_filter_full, raises_in_reader, raises_in_threads, raises_in_script,
    )
}  # fmt: skip


def run(name: str) -> str:
    """Do one fault in a folder of its own; returns what was seen. Raises AssertionError."""
    with tempfile.TemporaryDirectory(prefix="pnk") as folder, ExitStack() as stack:
        return FAULTS[name](Place(Path(folder), stack))


def main() -> int:
    """The command line; exit status 1 if a fault did more harm than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--rounds", type=int, default=1, help="how often each (default: 1)")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]}: choose from {', '.join(FAULTS)}")
    failures = 0
    for number in range(options.rounds):
        for name in options.names or FAULTS:
            begun = time.monotonic()
            try:
                seen = run(name)
            except pytest.skip.Exception as reason:
                seen = f"not here: {reason}"
            except Exception as error:
                failures += 1
                seen = f"FAILED: {type(error).__name__}: {error}"
            took = time.monotonic() - begun
            if number == 0 or seen.startswith("FAILED"):
                print(f"{name:20} {took:4.1f} s  {seen}", flush=True)
    print(f"{options.rounds} rounds, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
