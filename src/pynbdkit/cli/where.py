"""Where the server listens, and how its clients are told (URI, --run's variables)."""

from __future__ import annotations

import os
import socket

from ..errors import ConfigError
from ..server.listen import listen_tcp, listen_unix, listen_vsock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from .background import Identity
    from .options import CommandLine

LOCAL_CID: Final = 1
"""The machine itself, among the machines that vsock addresses name (VMADDR_CID_LOCAL)."""
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


def _absolute(path: str | None) -> str:
    return os.path.abspath(path) if path else ""


def unix_mode(text: str) -> int:
    """The permissions that --unix-mode names, in octal digits. Raises ConfigError."""
    digits = text.lstrip("0") or "0"
    if not text or text.strip("01234567") or len(digits) > 3:
        raise ConfigError(f"--unix-mode {text}: expecting octal digits, 0 to 777 (such as 660)")
    return int(digits, 8)


class Where:
    """The listening sockets that a command line asks for."""

    def __init__(
        self, line: CommandLine, activated: Sequence[socket.socket] = (), tls: str = "off"
    ) -> None:
        self._line = line
        self._tls = tls
        self._activated = list(activated)
        self._folder: str | None = None
        self.path: str | None = None
        self.port: int | None = None
        self._host = ""
        self._transport = ""  # of a URI: "", "+unix" or "+vsock"

    def listen(self, identity: Identity) -> list[socket.socket]:
        """Open them; the private one is for clients of the `identity`, too. Raises ConfigError."""
        if self._activated:
            self._found(self._activated)
            return self._activated
        if self._line.selinux_label is None:
            sockets = self._listen(identity)
        else:
            from .system import socket_label

            with socket_label(self._line.selinux_label):
                sockets = self._listen(identity)
        self._found(sockets)
        return sockets

    def _listen(self, identity: Identity) -> list[socket.socket]:
        line = self._line
        if line.vsock:
            return [listen_vsock(line.port or 10809)]
        if line.unix is None:
            family = socket.AF_INET if line.ipv4 else socket.AF_INET6 if line.ipv6 else 0
            return listen_tcp(line.ipaddr, line.port or 10809, family)
        mode = unix_mode(line.unix_mode) if line.unix_mode is not None else None
        if line.unix != "-":
            return [listen_unix(os.path.abspath(line.unix), mode)]
        self._folder = private_folder()
        self.path = os.path.join(self._folder, "socket")
        sockets = [listen_unix(self.path, mode)]
        self._hand_over(identity)
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
        family = sockets[0].family
        if family == socket.AF_UNIX:
            path = os.fsdecode(address)
            self.path = path if path and path[0] != "\0" else None  # no URI names an abstract one
            self._transport = "+unix"
        elif family in (socket.AF_INET, socket.AF_INET6):
            self._host, self.port = _host(address[0]), address[1]
        elif family == getattr(socket, "AF_VSOCK", None):
            self._host, self.port = str(LOCAL_CID), address[1]
            self._transport = "+vsock"

    def uri(self, export: str) -> str:
        """The NBD URI of an export; "" for a socket that URIs cannot name.

        With --tls=require it is for clients that do TLS, by the certificates or keys that were
        named to us: a client that has them elsewhere has to be told so anyway. With --tls=on it is
        for those without, as nbdkit's.
        """
        name = percent(export)
        scheme = ("nbds" if self._tls == "require" else "nbd") + self._transport
        query = [f"socket={percent(self.path, b'/')}"] if self.path is not None else []
        query += self._tls_query()
        words = f"?{'&'.join(query)}" if query else ""
        if self.path is not None:
            return f"{scheme}:///{name}{words}"
        if self.port is not None:
            return f"{scheme}://{self._host}:{self.port}" + (f"/{name}" if name else "") + words
        return ""

    def _tls_query(self) -> list[str]:
        if self._tls != "require":
            return []
        name, path = "tls-psk-file", self._line.tls_psk
        if not path:
            name, path = "tls-certificates", self._line.tls_certificates
        return [f"{name}={percent(os.path.abspath(path), b'/')}"] if path else []

    def variables(self, export: str) -> dict[str, str | None]:
        """The shell variables of --run (nbdkit-captive(1)); None: it is not set."""
        uri = self.uri(export)
        return {
            "uri": uri,
            "nbd": uri,
            "port": str(self.port) if self.port is not None else "",
            "unixsocket": self.path or "",
            "exportname": export,
            "tls": {"on": "1", "require": "2"}.get(self._tls),
            "tls_certificates": _absolute(self._line.tls_certificates),
            "tls_psk": _absolute(self._line.tls_psk),
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
