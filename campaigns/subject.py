"""A server of the command line under examination: its process, and what the kernel says of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crowd import Address
from half_open import SERVER, Network

PYNBDKIT = (sys.executable, "-m", "pynbdkit")
PATIENCE = 30.0
"""Seconds for what a server does at once, on a machine that is busy."""
LOOK = 0.01
"""Seconds between looks for what no event tells: the figures of another process."""
PORT = 10809
KIB, MIB = 1 << 10, 1 << 20


class SubjectError(Exception):
    """The server does not start, ends by itself, or does not come to what it should."""


@dataclass(frozen=True)
class Figures:
    """Of a process: resident, proportional and virtual memory in bytes, threads, descriptors.

    `sockets`: how many of the descriptors are sockets.
    """

    rss: int
    pss: int
    virtual: int
    threads: int
    descriptors: int
    sockets: int

    @classmethod
    def of(cls, pid: int) -> Figures:
        """What a process has now. Raises SubjectError when it has gone."""
        proc = Path(f"/proc/{pid}")
        try:
            rollup = _fields(proc / "smaps_rollup")
            targets = [_target(path) for path in (proc / "fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            raise SubjectError("the server has ended by itself") from None
        status = _fields(proc / "status")
        if "VmSize" not in status:
            raise SubjectError("the server has ended by itself")
        return cls(
            rollup["Rss"] * KIB,
            rollup["Pss"] * KIB,
            status["VmSize"] * KIB,
            status["Threads"],
            len(targets),
            sum(target.startswith("socket:") for target in targets),
        )


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""  # closed meanwhile


def _fields(path: Path) -> dict[str, int]:
    """The lines "Name: number" of a file in /proc."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        first = rest.split()[:1]
        if first and first[0].isdigit():
            found[name] = int(first[0])
    return found


class Subject:
    """A server in the foreground, on a Unix socket or a TCP port of 127.0.0.1.

    Arguments: a folder for its socket and log (a short path); `arguments` behind -f and the socket;
    `command` that starts it; `tcp`: it is handed a listening TCP socket (socket activation, which
    the peer knows as well: so the port needs no luck); `network`: it is run on the server's side of
    that, and listens there.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = ("memory", "64M"),
        *,
        command: Sequence[str] = PYNBDKIT,
        tcp: bool = False,
        network: Network | None = None,
    ) -> None:
        self.log_path = folder / "log"
        self.address: Address = str(folder / "nbd.sock")
        if tcp:
            with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
                self.address = listener.getsockname()
                fd = listener.fileno()
                move = f"exec 3<&{fd} {fd}<&-;" if fd != 3 else ""
                shell = f'{move} LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
                words = ["bash", "-c", shell, "bash", *command, "-f", *arguments]
                self.process = self._start(words, fd)
        elif network is not None:
            self.address = (SERVER, PORT)
            words = [*network.command, *command, "-f", "-i", SERVER, "-p", str(PORT), *arguments]
            self.process = self._start(words)
        else:
            Path(str(self.address)).unlink(missing_ok=True)
            self.process = self._start([*command, "-f", "-U", str(self.address), *arguments])
        try:
            if network is None:
                self._greets()
            else:
                network.as_client(self._greets)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _start(self, words: Sequence[str], *keep: int) -> subprocess.Popen[bytes]:
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=keep
            )

    def _greets(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SubjectError(f"the server ended at once: {self.log()}")
            family = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
            with socket.socket(family) as sock:
                sock.settimeout(PATIENCE)
                try:
                    sock.connect(self.address)
                    if sock.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC":
                        return
                except OSError:
                    time.sleep(LOOK)
        raise SubjectError(f"the server does not greet: {self.log()}")

    def log(self) -> str:
        """What it has said."""
        return self.log_path.read_text(errors="replace")

    def figures(self) -> Figures:
        """What it has now."""
        return Figures.of(self.process.pid)

    def settle(
        self, threads: int, descriptors: int, patience: float = PATIENCE
    ) -> tuple[Figures, float]:
        """Wait until it has no more of these than said; returns its figures, and the seconds.

        Raises SubjectError when that does not come true.
        """
        begin = time.monotonic()
        while True:
            now = self.figures()
            seconds = time.monotonic() - begin
            if now.threads <= threads and now.descriptors <= descriptors:
                return now, seconds
            if seconds > patience:
                raise SubjectError(
                    f"after {patience:g} s the server still has {now.threads} threads and"
                    f" {now.descriptors} descriptors, not {threads} and {descriptors}"
                )
            time.sleep(LOOK)

    def quiet(self) -> Figures:
        """Wait until the listening socket is the only one; returns what it has then.

        Raises SubjectError when that does not come true.
        """
        deadline = time.monotonic() + PATIENCE
        while (now := self.figures()).sockets > 1 or now.threads > 2:
            if time.monotonic() > deadline:
                raise SubjectError(f"nobody is connected, but the server has {now}")
            time.sleep(LOOK)
        return now

    def stop(self) -> None:
        """End it in order. Raises SubjectError when it does not, or has complained of a bug."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise SubjectError(f"the server does not stop: {self.log()[-2000:]}") from None
        if status or "Traceback" in self.log():
            raise SubjectError(f"the server ended with {status}: {self.log()[-2000:]}")

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:  # what was seen first is what matters
            self.process.kill()
            self.process.wait()


def peer() -> tuple[str, ...] | None:
    """The command of nbdkit; None where it is not installed."""
    found = shutil.which("nbdkit")
    return None if found is None else (found,)
