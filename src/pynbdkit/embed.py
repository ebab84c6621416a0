"""A server inside somebody's own program, or test.

with pynbdkit.serve(Memory(size="1M")) as server:
    subprocess.run(["qemu-img", "info", server.uri])
"""

from __future__ import annotations

import os
import tempfile

from .chain import Chain
from .device import Device
from .errors import ConfigError
from .loader import load_filter
from .loader import load_plugin as _load_plugin
from .plugin import Plugin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Any

    from .filter import Filter
    from .server.server import Server
    from .session import Session
    from .tls import Credentials


def load_plugin(name: str, **config: object) -> Plugin:
    """A plugin by name or path, configured: ``load_plugin("file", file="disk.img")``.

    Values that are not texts are handed on as texts. Raises LoadError or ConfigError.
    """
    plugin = _load_plugin(name)
    for key, value in config.items():
        plugin.config(key, value if isinstance(value, str) else _as_text(value))
    return plugin


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


class _Devices(Plugin):
    """A plugin that opens devices from a factory, or one device for all."""

    name = "device"

    def __init__(self, source: Device | Callable[[], Device]) -> None:
        super().__init__()
        self._source = source

    def open(self, session: Session) -> Device:
        if isinstance(self._source, Device):
            return _Shared(self._source)
        return self._source()

    def cleanup(self) -> Awaitable[None] | None:
        if isinstance(self._source, Device) and type(self._source).close is not Device.close:
            closing: Any = self._source.close
            return closing()  # type: ignore[no-any-return]
        return None


class _Shared(Device):
    """One connection's view of a device that all connections share: its close is not theirs."""

    def __init__(self, device: Device) -> None:
        self.blocking = device.blocking
        self.carries_fua = device.carries_fua
        self.asynchronous = device.asynchronous
        for name in dir(device):
            method = getattr(device, name)
            own = getattr(method, "__func__", method) is not getattr(Device, name, None)
            if own and callable(method) and not name.startswith("_") and name != "close":
                setattr(self, name, method)


class RunningServer:
    """A server that is running; `with` or `stop` ends it.

    Attributes: `uri` (of the default export), `socket` (the Unix socket's path, or None), `port`
    (the TCP port, or None).
    """

    def __init__(self, server: Server, socket: str | None, address: tuple[str, int] | None) -> None:
        self._server = server
        self._scheme = "nbds" if server.tls == "require" else "nbd"
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.socket = socket
        self.port = address[1] if address else None
        self._host = address[0] if address else ""

    @property
    def uri(self) -> str:
        """The URI of the default export."""
        return self.export_uri("")

    def export_uri(self, name: str) -> str:
        """The URI of an export."""
        from urllib.parse import quote

        if self.socket is not None:
            return f"{self._scheme}+unix:///{quote(name, safe='')}?socket={quote(self.socket)}"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self.port}/{quote(name, safe='')}"

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._server.connections

    def reload_tls(self) -> bool:
        """Read certificates or keys again, for new connections (as SIGHUP does).

        Returns False, after a line in the log, where they are wrong: the old ones stay in use.
        """
        credentials = self._server.credentials
        return credentials is not None and credentials.reload()

    def stop(self) -> None:
        """Finish running requests, close devices, and end; safe to call twice."""
        self._server.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        elif self.socket is not None and os.path.exists(self.socket):
            os.unlink(self.socket)

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _credentials(
    tls: str,
    certificates: str | os.PathLike[str] | None,
    psk: str | os.PathLike[str] | None,
    verify_peer: bool,
) -> Credentials | None:
    if tls not in ("off", "on", "require"):
        raise ConfigError(f"serve: tls is {tls!r}, not 'off', 'on' or 'require'")
    if tls == "off":
        if certificates is not None or psk is not None or verify_peer:
            raise ConfigError("serve: certificates or keys, but no tls: say tls='require'")
        return None
    from .tls import Credentials

    return Credentials(
        os.path.abspath(certificates) if certificates is not None else None,
        os.path.abspath(psk) if psk is not None else None,
        verify_peer,
    )


def serve(
    source: Plugin | Device | Callable[[], Device],
    *,
    filters: Sequence[Filter | str] = (),
    unix: str | os.PathLike[str] | None = None,
    tcp: tuple[str, int] | None = None,
    readonly: bool = False,
    threads: int = 16,
    structured_replies: bool = True,
    meta_contexts: bool = True,
    extended_headers: bool = True,
    handshake_mask: int = 3,
    oldstyle: bool = False,
    handshake_timeout: float = 0,
    tls: str = "off",
    tls_certificates: str | os.PathLike[str] | None = None,
    tls_psk: str | os.PathLike[str] | None = None,
    tls_verify_peer: bool = False,
    parameters: dict[str, str] | None = None,
) -> RunningServer:
    """Serve a disk from this process, in threads; returns when clients can connect.

    Arguments:
        source: a configured Plugin; a Device (shared by all connections: it has to stand that);
            or a function (a Device class, say) that makes a Device per connection.
        filters: Filter objects or names, outermost first.
        unix: the path of a Unix socket (default: one in a new private folder, unless `tcp`).
        tcp: (address, port) to listen on instead; port 0 takes a free one.
        readonly: as -r.
        threads: most requests at a time per connection, where calls may wait.
        structured_replies, meta_contexts, extended_headers, handshake_mask, oldstyle: as --no-sr,
            --no-mc, --no-eh, --mask-handshake and -o, to test clients with.
        handshake_timeout: seconds that a client has for its handshake; 0: as long as it likes.
        tls: "off"; "on" (clients may ask for encryption); "require" (they have to).
        tls_certificates: the folder of ca-cert.pem, server-cert.pem, server-key.pem and ca-crl.pem
            (None: the default folders of nbdkit-tls(1)).
        tls_psk: a file of pre-shared keys, in place of certificates (Python 3.13 and newer).
        tls_verify_peer: refuse clients without a certificate that the CA has signed.
        parameters: key=value for filters given by name, and for the plugin.

    Raises ConfigError or LoadError, and whatever the plugin's get_ready raises.
    """
    from .server.listen import listen_tcp, listen_unix
    from .server.server import Server

    if unix is not None and tcp is not None:
        raise ConfigError("serve: unix and tcp exclude each other")
    credentials = _credentials(tls, tls_certificates, tls_psk, tls_verify_peer)
    if credentials is not None and oldstyle:
        raise ConfigError("serve: oldstyle and tls exclude each other: the oldstyle has no TLS")
    plugin = source if isinstance(source, Plugin) else _Devices(source)
    chain = Chain(plugin, [load_filter(f) if isinstance(f, str) else f for f in filters])
    chain.load()
    for key, value in (parameters or {}).items():
        chain.config(key, value)
    chain.complete()
    chain.get_ready()
    chain.after_fork()

    folder = None
    path: str | None = None
    address = None
    if tcp is not None:
        listeners = listen_tcp([tcp[0]], tcp[1])
        address = listeners[0].getsockname()[:2]
    else:
        if unix is None:
            folder = tempfile.TemporaryDirectory(prefix="pynbdkit")
            path = os.path.join(folder.name, "socket")
        else:
            path = os.fspath(unix)
        listeners = [listen_unix(path)]
    server = Server(
        chain,
        listeners,
        readonly=readonly,
        threads=threads,
        structured_replies=structured_replies,
        meta_contexts=meta_contexts,
        extended_headers=extended_headers,
        handshake_mask=handshake_mask,
        oldstyle=oldstyle,
        handshake_timeout=handshake_timeout,
        tls=tls,
        credentials=credentials,
    )
    running = RunningServer(server, path, address)
    running._folder = folder
    server.start()
    return running
