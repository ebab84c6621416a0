"""Listening sockets: Unix, TCP, and those inherited from a service manager."""

from __future__ import annotations

import os
import socket

from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

LOOPBACK = ("127.0.0.1", "::1")
FIRST_INHERITED = 3
"""SD_LISTEN_FDS_START: the first descriptor of socket activation."""


def listen_unix(path: str) -> socket.socket:
    """Listen on a Unix socket at `path`, which must not exist. Raises ConfigError."""
    if len(os.fsencode(path)) > 107:
        raise ConfigError(f"-U {path}: the path of a Unix socket has at most 107 bytes")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise ConfigError(f"-U {path}: {error.strerror}") from None
    return sock


def listen_tcp(
    addresses: Sequence[str] = LOOPBACK, port: str | int = 10809, family: int = socket.AF_UNSPEC
) -> list[socket.socket]:
    """Listen on every address that the names stand for. Raises ConfigError.

    Arguments: names or addresses ("" stands for all interfaces), a port number or service name
    (0: any free one, the same for all addresses), AF_INET or AF_INET6 to restrict names.
    """
    found: list[tuple[int, Any]] = []
    explicit = tuple(addresses) != LOOPBACK
    for address in addresses:
        try:
            infos = socket.getaddrinfo(
                address or None,
                port,
                family,
                socket.SOCK_STREAM,
                flags=socket.AI_PASSIVE,
            )
        except (socket.gaierror, OverflowError) as error:
            if not explicit and str(port).isdigit():
                continue  # this machine has no such loopback
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"cannot listen on {address or '<any>'}:{port}: {reason}") from None
        found += [(info[0], info[4]) for info in infos if (info[0], info[4]) not in found]
    sockets: list[socket.socket] = []
    chosen = None
    last: OSError | None = None
    for kind, where in found:
        sock = socket.socket(kind, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if chosen is not None and where[1] == 0:
                where = (where[0], chosen, *where[2:])
            sock.bind(where)
            sock.listen(socket.SOMAXCONN)
        except OSError as error:
            sock.close()
            last = error
            if error.errno == 98:
                for other in sockets:
                    other.close()
                raise ConfigError(
                    f"cannot listen on {where[0]}:{where[1]}: {error.strerror}"
                ) from None
            continue
        chosen = sock.getsockname()[1]
        sockets.append(sock)
    if not sockets:
        reason = last.strerror if last is not None else "no address"
        raise ConfigError(
            f"cannot listen on {', '.join(a or '<any>' for a in addresses)}: {reason}"
        )
    return sockets


def inherited() -> list[socket.socket]:
    """The sockets of socket activation (LISTEN_PID, LISTEN_FDS); [] where there are none."""
    pid, fds = os.environ.get("LISTEN_PID", ""), os.environ.get("LISTEN_FDS", "")
    if not pid or not fds or pid != str(os.getpid()):
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    try:
        count = int(fds)
    except ValueError:
        raise ConfigError(f"LISTEN_FDS={fds}: not a number") from None
    sockets = []
    for fd in range(FIRST_INHERITED, FIRST_INHERITED + count):
        os.set_inheritable(fd, False)
        try:
            sockets.append(socket.socket(fileno=fd))
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS: descriptor {fd}: {error.strerror}") from None
    return sockets
