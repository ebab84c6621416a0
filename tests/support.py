"""What the tests share: our server and the peers as processes, a clear word where one lacks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "") not in ("", "0", "false")


def lacking(text: str) -> NoReturn:
    """Something that a test needs is not there: CI fails, a laptop skips with what to do."""
    if IN_CI:
        pytest.fail(text)
    pytest.skip(text)


def missing(what: str) -> NoReturn:
    """A peer is not there: CI fails, a laptop skips with what to install."""
    listing = subprocess.run(
        [ROOT / "scripts" / "peers", "--list"], capture_output=True, text=True, check=True
    )
    lacking(f"{what} is not installed: apt-get install {listing.stdout.strip()}")


def need_uvloop() -> None:
    """A test runs on uvloop: CI fails without it, a laptop skips."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        lacking("uvloop is not installed: pip install 'pynbdkit[uvloop]'")


def need_root(why: str) -> None:
    """A test does what only root may: CI fails, a laptop skips."""
    if os.geteuid() != 0:
        lacking(f"{why} needs root: run the tests as root (in a virtual machine, say)")


def program(name: str) -> str:
    """The path of a peer's program."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        missing(name)
    return path


def next_peer(name: str) -> str:
    """The path of a newer Debian's program: libnbd 1.22, qemu 10, nbdkit 1.42 (scripts/peers-next).

    It runs like any other (the same files, sockets and network). Its python3 has libnbd's binding:
    a script for it is a text, because this interpreter cannot load that library.
    """
    folder = Path(os.environ.get("PYNBDKIT_PEERS") or ROOT / ".peers" / "trixie")
    path = folder / "bin" / name
    if not path.exists():
        lacking(f"no newer {name} in {folder}: scripts/peers-next makes it, or says what it lacks")
    return str(path)


def libnbd() -> ModuleType:
    """libnbd's Python binding (Debian's python3-libnbd, also from a virtual environment)."""
    try:
        import nbd
    except ImportError:
        sys.path.append("/usr/lib/python3/dist-packages")
        try:
            import nbd
        except ImportError:
            missing(f"libnbd's binding for Python {sys.version_info[0]}.{sys.version_info[1]}")
        finally:
            sys.path.remove("/usr/lib/python3/dist-packages")
    assert isinstance(nbd, ModuleType)
    return nbd


def open_files(pid: int) -> list[str]:
    """What a process has open; a file that it closes meanwhile, a module say, may be missing."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(descriptor))
    return links


def run(
    *command: str | Path, input: bytes | None = None, timeout: float = 60, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a peer's program; its output in the failure's message."""
    words = [str(word) for word in command]
    words[0] = program(words[0]) if "/" not in words[0] else words[0]
    done = subprocess.run(
        words,
        input=input.decode() if input is not None else None,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def pynbdkit(
    *arguments: str | Path, timeout: float = 60, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run our command line to its end."""
    return subprocess.run(  # type: ignore[no-any-return, call-overload]
        [sys.executable, "-m", "pynbdkit", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


class ServerProcess:
    """Our server (or, by `command`, a peer) in the foreground on a Unix socket."""

    def __init__(
        self, folder: Path, arguments: Sequence[str | Path], command: Sequence[str] | None = None
    ) -> None:
        self.folder = folder
        self.socket = folder / "nbd.sock"
        self.log_path = folder / "log"
        words = [*(command or (sys.executable, "-m", "pynbdkit"))]
        words += ["-f", "-U", str(self.socket), *map(str, arguments)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"server ended with {self.process.returncode}: {self.log()}")
            with socket.socket(socket.AF_UNIX) as probe:
                if self.socket.exists():
                    try:
                        probe.connect(str(self.socket))
                        return
                    except OSError:
                        pass
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"server does not listen: {self.log()}")
            time.sleep(0.005)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def export_uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"server does not stop: {self.log()}") from None

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
