"""Where the server listens, and how its clients are told (URI, --run's variables)."""

from __future__ import annotations

import os
import socket

from ..errors import ConfigError
from ..server.listen import listen_tcp, listen_unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from .background import Identity
    from .options import CommandLine

_UNRESERVED: Final = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
)


def percent(text: str, also: bytes = b"") -> str:
    """A text as part of a URI (RFC 3986), where the bytes `also` may stand as they are.

    As urllib.parse.quote, which costs two milliseconds to import and refuses other names than
    UTF-8.
    """
    return "".join(
        chr(byte) if byte in _UNRESERVED or byte in also else f"%{byte:02X}"
        for byte in os.fsencode(text)
    )


def private_folder() -> str:
    """Make a folder of our own for a socket, in $TMPDIR or /tmp. Raises ConfigError."""
    parent = os.path.abspath(os.environ.get("TMPDIR") or "/tmp")
    while True:
        folder = os.path.join(parent, f"pynbdkit-{os.urandom(6).hex()}")
        try:
            os.mkdir(folder, 0o700)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"-U -: cannot make {folder}: {error.strerror}") from None


def _host(address: str) -> str:
    """The host part of a URI, for clients on this machine, of an address that we listen on."""
    if address in ("127.0.0.1", "0.0.0.0"):
        return "localhost"
    if address in ("::1", "::"):  # "localhost" may be of IPv4 alone
        return "[::1]"
    return f"[{address.replace('%', '%25')}]" if ":" in address else address


class Where:
    """The listening sockets that a command line asks for."""

    def __init__(self, line: CommandLine, activated: Sequence[socket.socket]) -> None:
        self._line = line
        self._activated = list(activated)
        self._folder: str | None = None
        self.path: str | None = None
        self.port: int | None = None
        self._host = ""

    def listen(self, identity: Identity) -> list[socket.socket]:
        """Open them; the private one is for clients of the `identity`, too. Raises ConfigError."""
        line = self._line
        if self._activated:
            self._found(self._activated)
            return self._activated
        if line.unix is None:
            family = socket.AF_INET if line.ipv4 else socket.AF_INET6 if line.ipv6 else 0
            sockets = listen_tcp(line.ipaddr, line.port or 10809, family)
        elif line.unix != "-":
            sockets = [listen_unix(os.path.abspath(line.unix))]
        else:
            self._folder = private_folder()
            self.path = os.path.join(self._folder, "socket")
            sockets = [listen_unix(self.path)]
            self._hand_over(identity)
        self._found(sockets)
        return sockets

    def _hand_over(self, identity: Identity) -> None:
        """The private folder is the new user's."""
        assert self.path is not None
        assert self._folder is not None
        if identity.changes:
            try:
                for path in (self.path, self._folder):
                    os.chown(path, identity.uid, identity.gid)
            except OSError as error:
                raise ConfigError(f"-U -: {self._folder}: {error.strerror}") from None

    def _found(self, sockets: Sequence[socket.socket]) -> None:
        """Note where clients connect: at the first socket."""
        address = sockets[0].getsockname()
        if sockets[0].family == socket.AF_UNIX:
            path = os.fsdecode(address)
            self.path = path if path and path[0] != "\0" else None  # no URI names an abstract one
        elif sockets[0].family in (socket.AF_INET, socket.AF_INET6):
            self._host, self.port = _host(address[0]), address[1]

    def uri(self, export: str) -> str:
        """The NBD URI of an export; "" for a socket that URIs cannot name."""
        name = percent(export)
        if self.path is not None:
            return f"nbd+unix:///{name}?socket={percent(self.path, b'/')}"
        if self.port is not None:
            return f"nbd://{self._host}:{self.port}" + (f"/{name}" if name else "")
        return ""

    def variables(self, export: str) -> dict[str, str | None]:
        """The shell variables of --run (nbdkit-captive(1)); None: it is not set."""
        uri = self.uri(export)
        return {
            "uri": uri,
            "nbd": uri,
            "port": str(self.port) if self.port is not None else "",
            "unixsocket": self.path or "",
            "exportname": export,
            "tls": None,
            "pid": str(os.getpid()),
        }

    def remove(self) -> None:
        """Remove the private socket of `-U -`; any other is left, as the peer leaves it."""
        folder, self._folder = self._folder, None
        if folder is not None:
            for remove, path in ((os.unlink, os.path.join(folder, "socket")), (os.rmdir, folder)):
                try:
                    remove(path)
                except OSError:
                    pass  # gone already
