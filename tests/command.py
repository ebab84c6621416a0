"""Our command line as a process that is started, watched and ended by a test."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = [sys.executable, "-m", "pynbdkit"]

SLOW = """\
import nbdkit
from builtins import open as open_file
API_VERSION = 2
def config(key, value):
    globals()[key] = value
def note(text):
    with open_file(notes, "a") as stream:
        stream.write(text + "\\n")
def open(readonly):
    return 1
def close(h):
    note("close")
def cleanup():
    note("cleanup")
def get_size(h):
    return 1 << 20
def pread(h, buf, offset, flags):
    note("pread")
    if offset:
        open_file(gate).read()
    buf[:] = b"x" * len(buf)
"""
"""A script: `notes` is a file to tell of calls; a read past 0 waits at the FIFO `gate`."""


@contextmanager
def running(*arguments: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Our command line, killed at the end if it has not ended by then."""
    process = subprocess.Popen(  # type: ignore[call-overload]
        [*COMMAND, *map(str, arguments)],
        **{"stdin": subprocess.DEVNULL, **options},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_until(what: str, condition: object, timeout: float = 30) -> None:
    """Wait for something that nothing tells of."""
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what}: it has not happened"
        time.sleep(0.005)


def wait_for_file(path: Path, text: str = "", timeout: float = 30) -> str:
    """Wait until a file is there, and has a text; returns all that it has."""
    wait_until(f"{path} with {text!r}", lambda: path.exists() and text in path.read_text(), timeout)
    return path.read_text()


@contextmanager
def daemon(pidfile: Path) -> Iterator[int]:
    """The server whose pidfile this is, ended (and waited for) at the end."""
    pid = int(pidfile.read_text())
    fd = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
        except ProcessLookupError:
            pass
        ended = wait_for_end(fd)
        if not ended:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)
        assert ended, "the server does not stop"


def wait_for_end(pidfd: int, timeout: float = 30) -> bool:
    """Wait until a process has ended; False if it does not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def status_of(pid: int) -> dict[str, str]:
    """What /proc says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def can_bind(host: str) -> bool:
    """Whether this machine has the address: a container may know nothing of IPv6."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.bind((host, 0))
    except OSError:
        return False
    return True
