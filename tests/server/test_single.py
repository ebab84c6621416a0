"""-s: one client on stdin and stdout, a socket or two pipes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from command import COMMAND, SLOW, running, wait_for_file
from pynbdkit.server.single import Pipes

GREETING = b"NBDMAGICIHAVEOPT\0\3"

NOISY = """\
print("said while loading")
import os, nbdkit
os.write(1, b"written while loading\\n")
def open(readonly):
    print("said by open")
    assert os.read(0, 10) == b"", "stdin is the client's"
    return 1
def get_size(h): return 1 << 20
def pread(h, count, offset):
    os.write(1, b"written by pread\\n")
    if offset: raise KeyError("no such thing")
    return b"y" * count
"""


def bridge(client: socket.socket, to_server: int, from_server: int) -> list[threading.Thread]:
    """Carry a socket's bytes to and from two pipes."""

    def there() -> None:
        with contextlib.suppress(BrokenPipeError):  # the server ends first
            while data := client.recv(65536):
                os.write(to_server, data)
        os.close(to_server)

    def back() -> None:
        while data := os.read(from_server, 65536):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=target) for target in (there, back)]
    for thread in threads:
        thread.start()
    return threads


@pytest.fixture(params=["socket", "pipes"])
def single(request: pytest.FixtureRequest, nbd: ModuleType) -> Iterator[Any]:
    """single(words…): a libnbd handle on a server's stdin and stdout, and the server's process."""
    threads: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:

        def start(*words: str, **options: Any) -> tuple[Any, subprocess.Popen[bytes]]:
            ours, client = socket.socketpair()
            stack.enter_context(ours)
            ends = (ours, ours) if request.param == "socket" else (-1, -1)
            process = stack.enter_context(
                running("-s", *words, stdin=ends[0], stdout=ends[1], **options)
            )
            if process.stdin is not None:
                assert process.stdout is not None
                # Its end of the pipe is the bridge's alone to close.
                to_server = os.dup(process.stdin.fileno())
                process.stdin.close()
                threads.extend(bridge(ours, to_server, process.stdout.fileno()))
            else:
                ours.close()
            handle = nbd.NBD()
            handle.connect_socket(client.detach())
            handles.append(handle)
            return handle, process

        handles: list[Any] = []
        yield start
        for handle in handles:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()
        for thread in threads:
            thread.join()


def test_a_client_and_the_end(single: Any) -> None:
    handle, process = single("memory", "1M")
    handle.pwrite(b"abc" * 100000, 5)
    assert handle.pread(300000, 5) == b"abc" * 100000
    handle.shutdown()
    assert process.wait(30) == 0


def test_libnbd_starts_us(nbd: ModuleType) -> None:
    """The way that nbdkit(1) and libnbd's connect_command are made for each other."""
    handle = nbd.NBD()
    handle.connect_command([*COMMAND, "-s", "--exit-with-parent", "-r", "memory", "1M"])
    assert handle.get_size() == 1 << 20
    assert handle.is_read_only()
    handle.shutdown()


def test_who_the_client_is(single: Any, request: pytest.FixtureRequest, sockdir: Path) -> None:
    """Known of a Unix socket alone."""
    (sockdir / "p.py").write_text(
        "import nbdkit\ndef open(ro): return 1\ndef pread(h, c, o): return bytes(c)\n"
        "def get_size(h):\n"
        "    try: return nbdkit.peer_pid()\n"
        "    except RuntimeError: return 7\n"
    )
    handle, _ = single(str(sockdir / "p.py"))
    assert handle.get_size() == (os.getpid() if "socket" in request.node.name else 7)


def test_what_a_plugin_prints_is_not_for_the_client(single: Any, sockdir: Path) -> None:
    (sockdir / "p.py").write_text(NOISY)
    with open(sockdir / "log", "wb") as log:
        handle, process = single(str(sockdir / "p.py"), stderr=log)
    assert handle.pread(512, 0) == b"y" * 512
    with pytest.raises(Exception, match="Input/output error"):
        handle.pread(512, 512)
    assert handle.pread(512, 0) == b"y" * 512
    handle.shutdown()
    assert process.wait(30) == 0
    text = (sockdir / "log").read_text()
    for said in ("said while loading", "written while", "said by open", "written by", "KeyError"):
        assert said in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_request_finish(
    single: Any, nbd: ModuleType, sockdir: Path, number: int
) -> None:
    os.mkfifo(sockdir / "gate")
    (sockdir / "p.py").write_text(SLOW)
    notes = sockdir / "notes"
    handle, process = single(str(sockdir / "p.py"), f"notes={notes}", f"gate={sockdir}/gate")
    buffer = nbd.Buffer(512)
    cookie = handle.aio_pread(buffer, 512)
    wait_for_file(notes, "pread")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    (sockdir / "gate").write_text("")
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)
    assert bytes(buffer.to_bytearray()) == b"x" * 512
    assert process.wait(30) == 0
    assert notes.read_text().split() == ["pread", "close", "cleanup"]


def test_a_signal_ends_an_idle_server(single: Any) -> None:
    _, process = single("memory", "1M")
    process.terminate()
    assert process.wait(30) == 0


def test_a_signal_ends_a_server_whose_client_does_not_read() -> None:
    """Two pipes cannot be shut down; the server ends all the same."""
    code = (
        "import pynbdkit.server.server as server; server.STOP_PATIENCE = 0.3;"
        " from pynbdkit.cli.main import run; run()"
    )
    words = [sys.executable, "-c", code, "-s", "memory", "1M"]
    go = b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0"
    read = b"\x25\x60\x95\x13" + bytes(20) + b"\0\1\0\0"  # 64 KiB from 0
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(18) == GREETING
        process.stdin.write(go + read * 100)
        process.stdin.flush()
        process.stdout.read(1)  # it has begun to answer
        process.terminate()
        assert process.wait(20) == 0
        assert b"cut off" in process.stderr.read()


def test_inetd_gives_the_socket_as_stderr_too(sockdir: Path, nbd: ModuleType) -> None:
    """Messages do not get among the replies."""
    (sockdir / "p.py").write_text(NOISY)
    ours, client = socket.socketpair()
    words = [*COMMAND, "-s", str(sockdir / "p.py")]
    socket_of = ours.fileno()
    with subprocess.Popen(words, stdin=socket_of, stdout=socket_of, stderr=socket_of) as process:
        ours.close()
        handle = nbd.NBD()
        handle.connect_socket(client.detach())
        with pytest.raises(Exception, match="Input/output error"):
            handle.pread(512, 512)
        assert handle.pread(512, 0) == b"y" * 512
        handle.shutdown()
        assert process.wait(30) == 0


@pytest.mark.parametrize("redirect", ["<&-", ">&-"])
def test_a_client_that_is_not_there(redirect: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" -s memory 1M {redirect}', "sh", *COMMAND],
        stderr=subprocess.PIPE,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("pynbdkit: error: -s: the client is on stdin and stdout")
    assert done.stderr.count(b"\n") == 1


def test_a_closed_stderr_is_not_taken_for_the_client() -> None:
    with running("-s", "memory", "1M", stdin=-1, stdout=-1) as process:
        out = process.communicate(b"", timeout=30)[0]
    assert (process.returncode, out) == (0, GREETING)
    done = subprocess.run(
        ["sh", "-c", '"$@" -s memory 1M 2>&- </dev/null', "sh", *COMMAND],
        stdout=subprocess.PIPE,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, GREETING)


# -- Pipes -----------------------------------------------------------------------------------------


@pytest.fixture
def pipes() -> Iterator[tuple[Pipes, int, int]]:
    """Pipes, what writes to them, what reads from them."""
    read, feed = os.pipe()
    drain, write = os.pipe()
    pair = Pipes(read, write)
    yield pair, feed, drain
    pair.close()
    for fd in (feed, drain):
        try:
            os.close(fd)
        except OSError:
            pass  # the test has done it


def in_thread(call: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(call())
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def test_pipes_read_and_write(pipes: tuple[Pipes, int, int]) -> None:
    pair, feed, drain = pipes
    os.write(feed, b"hello")
    buffer = bytearray(10)
    assert pair.recv_into(buffer) == 5
    assert buffer[:5] == b"hello"
    assert pair.sendmsg([b"ab", memoryview(b"cd")]) == 4
    assert os.read(drain, 10) == b"abcd"
    os.close(feed)
    assert pair.recv_into(buffer) == 0
    assert pair.fileno() >= 0
    assert pair.getpeername() is None  # type: ignore[func-returns-value]


def test_pipes_wait_for_a_reader(
    pipes: tuple[Pipes, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, _, drain = pipes
    waits = threading.Event()
    wait = pair._write.wait

    def noted(seconds: float | None) -> None:
        waits.set()
        wait(seconds)

    monkeypatch.setattr(pair._write, "wait", noted)
    data = bytes(1 << 20)
    thread, results = in_thread(lambda: sum(iter_send(pair, data)))
    assert waits.wait(30)
    got = 0
    while got < len(data):
        got += len(os.read(drain, 1 << 16))
    thread.join()
    assert results == [len(data)]


def test_pipes_have_a_timeout_as_sockets_have(pipes: tuple[Pipes, int, int]) -> None:
    """The handshake's limit is set on whatever the client is behind."""
    pair, feed, drain = pipes
    ours, _theirs = socket.socketpair()
    both: list[Any] = [pair, ours]
    with ours, _theirs:
        for each in both:
            assert each.gettimeout() is None
            for seconds, failure in ((0.02, TimeoutError), (0, BlockingIOError)):
                each.settimeout(seconds)
                assert each.gettimeout() == seconds
                with pytest.raises(failure):
                    each.recv_into(bytearray(1))
                with pytest.raises(failure):
                    sum(iter_send(each, bytes(1 << 22)))
            with pytest.raises(ValueError, match="out of range"):
                each.settimeout(-1)
        os.write(feed, b"here")
        pair.settimeout(20)
        buffer = bytearray(10)
        assert pair.recv_into(buffer) == 4
        pair.settimeout(None)
        os.read(drain, 1 << 22)
        assert pair.sendmsg([b"x"]) == 1


def iter_send(pair: Pipes, data: bytes) -> Iterator[int]:
    view = memoryview(data)
    while view:
        count = pair.sendmsg([view])
        yield count
        view = view[count:]


def test_a_shut_down_pipe_reads_no_more_but_writes(pipes: tuple[Pipes, int, int]) -> None:
    pair, feed, drain = pipes
    thread, results = in_thread(lambda: pair.recv_into(bytearray(10)))
    pair.shutdown(socket.SHUT_RD)
    thread.join()
    assert results == [0]
    os.write(feed, b"late")
    assert pair.recv_into(bytearray(10)) == 0
    assert pair.sendmsg([b"x"]) == 1
    assert os.read(drain, 1) == b"x"


@pytest.mark.parametrize("before", [True, False])
def test_a_writer_that_waits_is_let_go(pipes: tuple[Pipes, int, int], before: bool) -> None:
    pair, _, _ = pipes
    if before:
        pair.shutdown(socket.SHUT_RD)
    thread, results = in_thread(lambda: sum(iter_send(pair, bytes(1 << 20))))
    pair.shutdown(socket.SHUT_RDWR)
    pair.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert isinstance(results[0], BrokenPipeError)
    with pytest.raises(BrokenPipeError):
        pair.sendmsg([b"x"])


def test_others_find_the_pipe_as_it_was() -> None:
    """It may be shared: O_NONBLOCK would stay with everybody who has it."""
    for blocking in (True, False):
        read, feed = os.pipe()
        drain, write = os.pipe()
        shared = os.dup(write)
        os.set_blocking(write, blocking)
        before = len(os.listdir("/proc/self/fd"))
        pair = Pipes(read, write)
        pair.close()
        pair.close()
        assert bool(fcntl.fcntl(shared, fcntl.F_GETFL) & os.O_NONBLOCK) != blocking
        assert pair.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) == before - 2
        for fd in (feed, drain, shared):
            os.close(fd)
