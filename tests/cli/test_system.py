"""Memory that stays (--swap), and labels of sockets."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import COMMAND, daemon, running, status_of, wait_for_file
from pynbdkit.cli import system
from pynbdkit.cli.system import lock_memory, socket_label
from pynbdkit.errors import ConfigError
from support import ServerProcess, need_root, pynbdkit

Connect = Callable[..., Any]
Serve = Callable[..., ServerProcess]
NOBODY = "nobody"


def locked(pid: int) -> int:
    """The kilobytes of a process that are locked."""
    return int(status_of(pid)["VmLck"].split()[0])


# -- --swap ----------------------------------------------------------------------------------------


KEEPS_MEMORY = """
kept = []

def open(readonly):
    kept.append(bytearray(1 << 25))
    return kept[-1]

def get_size(disk):
    return len(disk)

def pread(disk, buf, offset, flags):
    buf[:] = disk[offset:offset + len(buf)]
"""


def test_memory_is_locked_and_so_is_what_comes_later(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    need_root("locking memory")
    script = tmp_path / "keeps.py"
    script.write_text("API_VERSION = 2\n" + KEEPS_MEMORY)
    server = serve("--swap", "python", str(script))
    first = connect(server)  # answered, so the server has come as far as serving
    status = status_of(server.process.pid)
    before = locked(server.process.pid)
    assert before > int(status["VmRSS"].split()[0]) // 2
    second = connect(server)  # the script takes memory and keeps it
    assert first.get_size() == second.get_size()
    assert locked(server.process.pid) >= before + (1 << 25) // 1024


def test_a_connection_locks_little(serve: Serve, connect: Connect) -> None:
    """Not a thread's usual eight megabytes of stack, nor sixty-four of a heap of its own."""
    need_root("locking memory")
    server = serve("--swap", "memory", "1M")
    handles = [connect(server)]
    before = locked(server.process.pid)
    handles += [connect(server) for _ in range(10)]
    assert locked(server.process.pid) - before < 10 * (4 << 10)


def test_without_the_option_nothing_is_locked(serve: Serve, connect: Connect) -> None:
    server = serve("memory", "1M")
    connect(server)
    assert locked(server.process.pid) == 0


def test_the_server_in_the_background_is_the_one_that_is_locked(sockdir: Path) -> None:
    """A child does not inherit it."""
    need_root("locking memory")
    done = pynbdkit("-U", "s", "-P", "pid", "--swap", "memory", "1M", cwd=sockdir)
    assert done.returncode == 0, done.stderr
    with daemon(sockdir / "pid") as pid:
        assert locked(pid) > 0


def test_another_user_has_locked_memory_without_limit(sockdir: Path, connect: Connect) -> None:
    """The limit of a user without privileges would soon end the server's growth."""
    need_root("locking memory")
    sockdir.chmod(0o777)
    words = ["-f", "-U", f"{sockdir}/s", "-u", NOBODY, "-P", f"{sockdir}/pid", "--swap"]
    words += ["--unix-mode=666"]
    if not may_raise_limits():
        done = pynbdkit(*words, "memory", "1M")
        assert done.returncode == 1
        assert re.match(r".* --swap: nobody may lock \d+ KiB of memory only \(", done.stderr)
        return
    with running(*words, "memory", "64M") as process:
        wait_for_file(sockdir / "pid", "\n")
        assert resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK) == (-1, -1)
        handles = [connect(f"nbd+unix:///?socket={sockdir}/s") for _ in range(20)]
        handles[0].pwrite(bytes(1 << 25), 0)
        assert handles[19].pread(512, 1 << 24) == bytes(512)
        assert locked(process.pid) > 32 << 10


def may_raise_limits() -> bool:
    """Whether we are a root with all of root's rights: in a container it may be one with fewer."""
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) == infinite:
        return True
    code = f"import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, {infinite})"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def test_memory_that_cannot_be_locked(sockdir: Path) -> None:
    """Neither root's right, nor room below the limit: one line, and the way out."""
    need_root("leaving root behind")
    limits = [
        "prlimit",
        "--memlock=65536:65536",
        "setpriv",
        "--bounding-set=-ipc_lock,-sys_resource",
    ]
    words = [*limits, "--inh-caps=-ipc_lock,-sys_resource", *COMMAND, "-U", "-", "--swap"]
    done = subprocess.run(
        [*words, "memory", "1M", "--run", "echo ran"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "--swap: cannot lock memory: " in done.stderr
    assert "ulimit -l" in done.stderr


class Library:
    """A C library, as far as it is called."""

    def __init__(self, *failing: str, number: int = errno.EPERM) -> None:
        self.calls: list[object] = []
        self._failing = failing
        self._number = number

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: object) -> int:
            self.calls.append((name, *arguments))
            ctypes.set_errno(self._number)
            return -1 if name in self._failing else name == "is_selinux_enabled"

        return call


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process stays as it is."""

    def refuse(*arguments: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(threading, "stack_size", lambda size: None)


@pytest.mark.usefixtures("no_limit")
@pytest.mark.parametrize(
    ("machine", "flags"), [("x86_64", 3), ("aarch64", 3), ("ppc64le", 0x6000), ("sparc64", 0x6000)]
)
def test_flags_of_machines(machine: str, flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: library)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("", "", "", "", machine)))
    lock_memory()
    assert library.calls == [("mallopt", -8, 1), ("mlockall", flags)]


@pytest.mark.usefixtures("no_limit")
def test_a_system_without_mlockall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: object())
    with pytest.raises(ConfigError, match=r"^--swap: this system cannot lock memory"):
        lock_memory()


# -- --selinux-label -------------------------------------------------------------------------------


def test_a_label_is_for_the_sockets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: library)
    with socket_label("l\udcff"):
        library.calls.append("socket")
    with pytest.raises(KeyError), socket_label("x"):
        raise KeyError
    assert library.calls == [
        ("setsockcreatecon_raw", b"l\xff"),
        "socket",
        ("setsockcreatecon_raw", None),
        ("setsockcreatecon_raw", b"x"),
        ("setsockcreatecon_raw", None),
    ]


def test_labels_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("setsockcreatecon_raw")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: library)
    says = r"^--selinux-label=x: Operation not permitted$"
    with pytest.raises(ConfigError, match=says), socket_label("x"):
        pytest.fail("there is no label")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "LIBSELINUX", "libnosuch.so.1")
    says = r"^--selinux-label: libnosuch\.so\.1 is not installed"
    with pytest.raises(ConfigError, match=says), socket_label("x"):
        pytest.fail("there is no label")


@pytest.mark.parametrize("place", ["-U -", "-p 0", "--vsock -p 0"])
def test_every_listening_socket_gets_the_label(place: str, sockdir: Path) -> None:
    """Seen by the order of the calls, with a library in the place of the system's."""
    if "vsock" in place:
        try:
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
        except OSError:
            return  # tests/server/test_listen.py shows what is said then
    code = """if True:
        import ctypes, socket, sys
        class Library:
            def setsockcreatecon_raw(self, label):
                print("label", label)
                return 0
        ctypes.CDLL = lambda name, use_errno: Library()
        class Noted(socket.socket):
            def __init__(self, *arguments, **named):
                super().__init__(*arguments, **named)
                if "fileno" not in named: print("socket")
        socket.socket = Noted
        from pynbdkit.cli.main import main
        main(sys.argv[1:])"""
    words = [*place.split(), "-4", "--selinux-label=a:b", "memory", "1M", "--run", "true"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30
    )
    said = done.stdout.split("\n")
    assert said[0] == "label b'a:b'", done.stderr
    assert set(said[1:-2]) == {"socket"}
    assert said[-2:] == ["label None", ""]
