"""Listening sockets: Unix, TCP, vsock, and those inherited from a service manager.

And what a TCP connection is told (`tune`), so that it is quick, and ends when its client has gone.
"""

from __future__ import annotations

import errno
import os
import socket
import time

from .. import log
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

LOOPBACK: Final = ("127.0.0.1", "::1")
MAX_PATH: Final = 107
"""The bytes that a Unix socket's path may have (unix(7))."""
FIRST_INHERITED: Final = 3
"""SD_LISTEN_FDS_START: the first descriptor of socket activation."""
MAX_VSOCK_PORT: Final = (1 << 32) - 2
"""The one above stands for any port (VMADDR_PORT_ANY)."""
ATTEMPTS: Final = 20
"""How often a free port is looked for that is free on all addresses."""


KEEPALIVE_IDLE: Final = 60
"""Seconds of silence after which a TCP client is asked whether it is there. The system's two hours
keep the buffers, threads and exclusive devices of a client whose machine has lost its power."""
KEEPALIVE_INTERVAL: Final = 15
KEEPALIVE_COUNT: Final = 8
"""Eight questions without an answer, a quarter of a minute apart: a network may be away for two
minutes (a switch that starts anew) without a connection lost."""
QUIET: Final = 10.0
"""Seconds in which the same trouble with accepting clients is not said again."""


class Complaints:
    """Says what is wrong; but while it stays so, not for each client or attempt."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def __call__(self, message: str) -> None:
        """Log an error, unless it was said a moment ago."""
        now = time.monotonic()
        if now >= self._said.get(message, 0.0):
            log.error(message)
            self._said[message] = now + QUIET


def accept(listener: socket.socket, complain: Complaints) -> tuple[socket.socket | None, bool]:
    """The next client, None where there is none; and whether the system can accept now.

    If it cannot, that was said. Raises OSError where `listener` is no listening socket (any more).
    """
    try:
        return listener.accept()[0], True
    except (BlockingIOError, InterruptedError, ConnectionAbortedError):
        return None, True
    except OSError as error:
        if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
            raise  # this does not mend itself
        complain(f"accept: {error.strerror}")
        return None, False


def tune(sock: socket.socket) -> None:
    """Have a TCP connection send at once, and end when the other side has gone (tcp(7)).

    Does nothing to a socket of another kind. Raises OSError.
    """
    # Not TCP_USER_TIMEOUT: for it, a client that is there and takes no replies for a while (it was
    # stopped, or writes into a pipe that nobody reads) is one that has gone. Replies that a machine
    # without power does not acknowledge are given up by the kernel, after a quarter of an hour.
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
    ):
        number = getattr(socket, name, None)  # not every system has them all
        if number is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


def listen_unix(path: str, mode: int | None = None) -> socket.socket:
    """Listen on a Unix socket at `path`, which must not exist. Raises ConfigError.

    `mode`: its permissions (who may write to it may connect); None: as the umask has it.
    """
    size = len(os.fsencode(path))
    if size > MAX_PATH:
        raise ConfigError(
            f"cannot listen on {path}: a socket's path has at most {MAX_PATH} bytes, not {size}"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind_with_mode(sock, path, mode)
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            why = "it exists already; remove it, unless another server listens there"
        raise ConfigError(f"cannot listen on {path}: {why}") from None
    return sock


def _bind_with_mode(sock: socket.socket, path: str, mode: int | None) -> None:
    """Bind to a path so that the socket there has the mode from its first moment.

    By the umask: a chmod afterwards comes late, and would follow what somebody has put in the
    socket's place meanwhile; an fchmod before can take permissions away, but the umask cannot be
    given back by it. The umask is the whole process's; but no client is served as yet.
    """
    if mode is None:
        sock.bind(path)
        return
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def listen_vsock(port: str | int = 10809) -> socket.socket:
    """Listen on a vsock port, for the host and its virtual machines (vsock(7)).

    Arguments: a port number of 32 bits (0: any free one). Raises ConfigError.
    """
    from ..parse import parse_int

    try:
        number = parse_int("port", str(port), 0, MAX_VSOCK_PORT)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    family = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise ConfigError("--vsock: this system has no vsock sockets")
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"--vsock: this kernel has no vsock sockets: {error.strerror}"
            " (on Linux, the module 'vsock' and one for the machine's transport)"
        ) from None
    try:
        sock.bind((socket.VMADDR_CID_ANY, number or socket.VMADDR_PORT_ANY))
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on vsock port {number}: {error.strerror}") from None
    return sock


def listen_tcp(
    addresses: Sequence[str] = (), port: str | int = 10809, family: int = socket.AF_UNSPEC
) -> list[socket.socket]:
    """Listen on every address that the names stand for. Raises ConfigError.

    Arguments: names or addresses, "" for all interfaces (none at all: this machine alone); a port
    number or service name (0: any free port, the same for all addresses); AF_INET or AF_INET6 to
    restrict names. Of the addresses of one name (and of those of this machine) one is enough.
    """
    number = _port(port)
    groups = [_resolve([name], number, family) for name in addresses] or [
        _resolve(LOOPBACK, number, family)
    ]
    last = None
    for _ in range(ATTEMPTS):
        try:
            return _listen_all(groups)
        except _PortTaken as taken:  # the free port of one address was not free on another
            last = taken
    raise ConfigError(str(last))


class _PortTaken(ConfigError):
    pass


def _port(port: str | int) -> int:
    text = str(port).strip()
    if text.isascii() and text.removeprefix("-").isdigit():
        if 0 <= int(text) <= 65535:
            return int(text)
        raise ConfigError(f"port {text} is out of range (0 to 65535)")
    try:
        return socket.getservbyname(text, "tcp")
    except (OSError, ValueError):
        raise ConfigError(f"port {text!r}: neither a number nor the name of a service") from None


def _resolve(names: Sequence[str], port: int, family: int) -> list[tuple[int, Any]]:
    """(family, address) for each address that the names stand for."""
    found: list[tuple[int, Any]] = []
    for name in names:
        try:
            infos = socket.getaddrinfo(
                name or None, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, UnicodeError) as error:
            if len(names) > 1 and isinstance(error, OSError):
                continue  # loopback: of the other family, or this machine has only one of them
            why = error.strerror if isinstance(error, OSError) else "not a name"
            raise ConfigError(f"cannot listen on {name}: {why}") from None
        found += [(info[0], info[4]) for info in infos if (info[0], info[4]) not in found]
    return found


def _listen_all(groups: Sequence[Sequence[tuple[int, Any]]]) -> list[socket.socket]:
    """A socket for each address; raises ConfigError where a whole group fails."""
    sockets: list[socket.socket] = []
    done: set[tuple[int, Any]] = set()
    chosen = 0
    try:
        for group in groups:
            missing: ConfigError | None = None
            got_one = False
            for kind, where in group:
                if (kind, where) in done:  # two names of one address
                    got_one = True
                    continue
                any_port = where[1] == 0
                try:
                    sock = _listen(kind, (where[0], where[1] or chosen, *where[2:]))
                except OSError as error:
                    text = f"cannot listen on {_shown(where, chosen)}: {error.strerror}"
                    if error.errno == errno.EADDRINUSE:
                        raise (_PortTaken if any_port and chosen else ConfigError)(text) from None
                    missing = ConfigError(text)
                    continue
                sockets.append(sock)
                done.add((kind, where))
                got_one = True
                chosen = sock.getsockname()[1]
            if not got_one:
                raise missing or ConfigError("cannot listen: this machine has no such address")
    except ConfigError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _shown(where: Any, chosen: int) -> str:
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    return f"{host}:{where[1] or chosen}"


def _listen(kind: int, where: Any) -> socket.socket:
    sock = socket.socket(kind, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(socket.SOMAXCONN)
    except OSError:
        sock.close()
        raise
    return sock


def inherited() -> list[socket.socket]:
    """The sockets of socket activation (LISTEN_PID, LISTEN_FDS: sd_listen_fds(3)); [] without.

    To be called before anything else opens a descriptor. The variables are removed, so that no
    process that we start takes them for its own. Raises ConfigError.
    """
    variables = {
        name: os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    }
    if not variables["LISTEN_FDS"] or variables["LISTEN_PID"] != str(os.getpid()):
        return []
    count = variables["LISTEN_FDS"]
    if not (count.isascii() and count.isdigit() and 0 < int(count) < 1 << 20):
        raise ConfigError(f"socket activation: LISTEN_FDS={count} is not a number of sockets")
    sockets = []
    for fd in range(FIRST_INHERITED, FIRST_INHERITED + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            why = error.strerror or str(error)
            raise ConfigError(f"socket activation: descriptor {fd}: {why}") from None
        if not listens:
            sock.detach()
            raise ConfigError(f"socket activation: descriptor {fd} is not a listening socket")
        sockets.append(sock)
    return sockets
