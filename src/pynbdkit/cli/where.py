"""Where the server listens, and how its clients are told (URI, --run's variables)."""

from __future__ import annotations

import os
import socket

from ..server.listen import LOOPBACK, listen_tcp, listen_unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .options import CommandLine


class Where:
    """The listening sockets that a command line asks for."""

    def __init__(self, line: CommandLine, activated: Sequence[socket.socket]) -> None:
        self._line = line
        self._activated = list(activated)
        self._folder: str | None = None
        self.path: str | None = None
        self.port: int | None = None
        self._host = "localhost"

    def listen(self) -> list[socket.socket]:
        """Open them. Raises ConfigError."""
        line = self._line
        if self._activated:
            return self._activated
        if line.unix is not None:
            self.path = line.unix
            if line.unix == "-":
                import tempfile

                self._folder = tempfile.mkdtemp(prefix="pynbdkit")
                self.path = os.path.join(self._folder, "socket")
                sock = listen_unix(self.path)
                if line.user or line.group:
                    self._hand_over()
            else:
                self.path = os.path.abspath(line.unix)
                sock = listen_unix(self.path)
            return [sock]
        family = socket.AF_INET if line.ipv4 else socket.AF_INET6 if line.ipv6 else 0
        addresses: Sequence[str] = line.ipaddr or LOOPBACK
        if not line.ipaddr and family:
            addresses = LOOPBACK[:1] if line.ipv4 else LOOPBACK[1:]
        sockets = listen_tcp(addresses, line.port or 10809, family)
        self.port = sockets[0].getsockname()[1]
        host = sockets[0].getsockname()[0]
        if line.ipaddr and host not in ("0.0.0.0", "::", *LOOPBACK):
            self._host = f"[{host}]" if ":" in host else host
        return sockets

    def _hand_over(self) -> None:
        """The private folder stays usable for the user that the server becomes."""
        from . import background

        assert self._folder is not None
        assert self.path is not None
        uid = background._number("user", self._line.user) if self._line.user else -1
        gid = background._number("group", self._line.group) if self._line.group else -1
        for path in (self.path, self._folder):
            os.chown(path, uid, gid)

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        from urllib.parse import quote

        name = quote(export, safe="")
        if self.path is not None:
            return f"nbd+unix:///{name}?socket={quote(self.path)}"
        if self.port is None:
            return ""
        return f"nbd://{self._host}:{self.port}" + (f"/{name}" if name else "")

    def variables(self, export: str) -> dict[str, str]:
        """The shell variables of --run (nbdkit-captive(1))."""
        uri = self.uri(export)
        return {
            "uri": uri,
            "nbd": uri,
            "port": str(self.port) if self.port is not None else "",
            "unixsocket": self.path or "",
            "exportname": export,
            "tls": "",
            "pid": str(os.getpid()),
        }

    def remove(self) -> None:
        """Remove the private socket of `-U -`; any other is left, as the peer leaves it."""
        if self._folder is not None and self.path is not None:
            for remove, path in ((os.unlink, self.path), (os.rmdir, self._folder)):
                try:
                    remove(path)
                except OSError:
                    pass  # gone already
