"""TCP clients whose machine has gone: no packet comes from them any more, and none says so.

A network of our own makes them: two network namespaces and a veth pair between them (root may make
these). The client's end of it is put down, as when a cable is pulled: to the server, the client is
silent from then on. What notices is TCP: its keepalive questions where a client idles, its repeats
of what is not acknowledged where replies were on their way.

That takes minutes, as it should. `Patience.scaled` makes the times of the questions short in the
kernel, on the server's very sockets, which `sockets_of` fetches with pidfd_getfd(2): the server is
not told that it is a test, and what it has not asked of the kernel does not come true. How often is
repeated is a setting of the network (tcp_retries2), so the server's has its own.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SYS_PIDFD_GETFD = 438
SYS_SETNS = {"x86_64": 308, "aarch64": 268}
CLONE_NEWNET = 0x40000000
SERVER, CLIENT = "10.99.0.1", "10.99.0.2"
"""In namespaces of their own: no other network sees these addresses."""


def unable() -> str:
    """Why no network can be made here; "" where it can."""
    if os.geteuid() != 0:
        return "half-open TCP needs root, for network namespaces"
    if os.uname().machine not in SYS_SETNS:
        return "half-open TCP: setns(2) has a number that is not known here"
    try:
        with Network("probe"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"half-open TCP needs network namespaces (ip netns, veth): {said.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class Network:
    """A namespace for the server, one for its clients, and a cable between."""

    def __init__(self, name: str, repeats: int | None = None) -> None:
        """`repeats`: how often the server's side sends again (None: as often as always)."""
        self._repeats = repeats
        unique = f"{name[:6]}{os.getpid()}"
        self.server, self.client = f"nbds-{unique}", f"nbdc-{unique}"

    def __enter__(self) -> Network:
        try:
            for name in (self.server, self.client):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self.server, "link", "add", "wire", "type", "veth", "peer", "name", "wire",
                "netns", self.client)  # fmt: skip
            for name, address in ((self.server, SERVER), (self.client, CLIENT)):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
                _ip("-n", name, "link", "set", "wire", "up")
            if self._repeats is not None:
                value = f"net.ipv4.tcp_retries2={self._repeats}"
                subprocess.run(
                    [*self.command, "sysctl", "-qw", value], check=True, capture_output=True
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (self.server, self.client):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @property
    def command(self) -> tuple[str, ...]:
        """What to put before a command to run it on the server's side (it keeps its pid)."""
        return ("ip", "netns", "exec", self.server)

    def cut(self) -> None:
        """Pull the cable, at the client's end."""
        _ip("-n", self.client, "link", "set", "wire", "down")

    def as_client(self, call: Callable[[], T]) -> T:
        """What `call` returns when it is made among the clients (their sockets stay there)."""
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with Path(f"/run/netns/{self.client}").open("rb") as namespace:
                    _enter(namespace.fileno())
                done.append(call())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)  # a thread has a namespace of its own
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return done[0]


def _enter(namespace: int) -> None:
    """Go into a network namespace, with this thread (setns(2)). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_SETNS[os.uname().machine], namespace, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@contextmanager
def sockets_of(pid: int) -> Iterator[list[socket.socket]]:
    """The TCP connections of another process, as if they were ours (pidfd_getfd(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        handle = os.pidfd_open(pid)
        stack.callback(os.close, handle)
        found = []
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
            except FileNotFoundError:
                continue
            fd = libc.syscall(SYS_PIDFD_GETFD, handle, int(name), 0)
            if fd < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            sock = stack.enter_context(socket.socket(fileno=fd))
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if sock.family == socket.AF_INET and not listens:
                found.append(sock)
        yield found


@dataclass(frozen=True)
class Patience:
    """Of a socket: keepalive's idle time, interval and count, in seconds."""

    asks: bool
    idle: int
    interval: int
    count: int

    @classmethod
    def of(cls, sock: socket.socket) -> Patience:
        """What the kernel has for a connection."""

        def tcp(option: int) -> int:
            return sock.getsockopt(socket.IPPROTO_TCP, option)

        return cls(
            bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)),
            tcp(socket.TCP_KEEPIDLE),
            tcp(socket.TCP_KEEPINTVL),
            tcp(socket.TCP_KEEPCNT),
        )

    @property
    def silence(self) -> float:
        """After how many seconds an idle client that has gone is noticed."""
        return self.idle + self.interval * self.count if self.asks else float("inf")

    def scaled(self, sock: socket.socket, factor: float) -> Patience:
        """Have a connection wait for less: what it has is multiplied; what is off stays off."""
        idle = max(round(self.idle * factor), 1)
        interval = max(round(self.interval * factor), 1)
        short = Patience(self.asks, idle, interval, self.count)
        for option, value in (
            (socket.TCP_KEEPIDLE, short.idle),
            (socket.TCP_KEEPINTVL, short.interval),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return short
