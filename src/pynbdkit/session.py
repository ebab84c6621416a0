"""Session: what is known of a connection when a device is opened for it.

`current()` finds the session of the running thread, or of the running coroutine, for code that gets
no argument (the `nbdkit` module of scripts: `export_name()`, `is_tls()`, `peer_name()` …).
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_local = threading.local()
find_session: Callable[[], Session | None] | None = None
"""Finds the session of the running coroutine, where there are coroutines (`loop.py` sets it)."""
stops: list[Callable[[], None]] = []
"""`stop` of every server of this process, for code that runs outside of any connection."""
stdio_is_taken = False
"""Whether the client is on stdin and stdout (-s): they are not for plugins then."""


class Session:
    """One connection, as plugins and filters may see it.

    Attributes: `readonly` (the server or a layer above wants no writes), `export_name` (sent by
    the client, not to be trusted), `is_tls`, `peer_name` (the socket's peer address: a tuple for
    TCP, a text for a Unix socket, None where there is none), `peer_tls_dn` and
    `peer_tls_issuer_dn` (the names in the client's certificate, which was verified, in the form of
    RFC 4514; "" where it has shown none), `peer_tls_user` (the user of its pre-shared key, or "").
    """

    __slots__ = (
        "_credentials",
        "_disconnect",
        "_security",
        "_shutdown",
        "_stopping",
        "export_name",
        "is_tls",
        "kept",
        "peer_name",
        "peer_tls_dn",
        "peer_tls_issuer_dn",
        "peer_tls_user",
        "readonly",
    )

    def __init__(
        self,
        *,
        readonly: bool = False,
        export_name: str = "",
        is_tls: bool = False,
        peer_name: Any = None,
        credentials: tuple[int, int, int] | None = None,
        security: Callable[[], str | None] | None = None,
        shutdown: Callable[[], None] | None = None,
        disconnect: Callable[[bool], None] | None = None,
        stopping: Callable[[float], bool] | None = None,
    ) -> None:
        self.readonly = readonly
        self.export_name = export_name
        self.is_tls = is_tls
        self.peer_name = peer_name
        self.peer_tls_dn = ""
        self.peer_tls_issuer_dn = ""
        self.peer_tls_user = ""
        self.kept: dict[bytes, bytes] = {}  # texts that a plugin in C has pointers to
        self._credentials = credentials
        self._shutdown = shutdown
        self._security = security
        self._disconnect = disconnect
        self._stopping = stopping

    def replace(self, *, readonly: bool | None = None, export_name: str | None = None) -> Session:
        """A copy for the layer below, with another readonly or export name."""
        copy = Session.__new__(Session)
        for slot in Session.__slots__:
            setattr(copy, slot, getattr(self, slot))
        if readonly is not None:
            copy.readonly = readonly
        if export_name is not None:
            copy.export_name = export_name
        return copy

    @property
    def peer_pid(self) -> int | None:
        """The peer's process id; None unless it came over a Unix socket."""
        return self._credentials[0] if self._credentials else None

    @property
    def peer_uid(self) -> int | None:
        """The peer's user id; None unless it came over a Unix socket."""
        return self._credentials[1] if self._credentials else None

    @property
    def peer_gid(self) -> int | None:
        """The peer's group id; None unless it came over a Unix socket."""
        return self._credentials[2] if self._credentials else None

    @property
    def peer_security_context(self) -> str | None:
        """The peer's security label (SELinux, Smack); None where the system has none for it."""
        return self._security() if self._security is not None else None

    def shutdown(self) -> None:
        """Ask the server to stop (running requests finish first)."""
        if self._shutdown is not None:
            self._shutdown()

    def disconnect(self, force: bool = False) -> None:
        """End this connection: at once with `force`, else after the replies that are due."""
        if self._disconnect is not None:
            self._disconnect(force)

    def check(self) -> None:
        """Raise OSError(ESHUTDOWN) if the server is stopping or the client has gone.

        For what takes long and is of no use any more then.
        """
        self.sleep(0)

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake early when the server stops or the client is gone.

        Raises OSError(ESHUTDOWN) when there is no point in going on (nbdkit_nanosleep).
        """
        import errno

        if self._stopping is None:
            import time

            time.sleep(seconds)
        elif self._stopping(seconds):
            raise OSError(errno.ESHUTDOWN, "the server is stopping, or the client has gone")


def current() -> Session | None:
    """The session that the running thread or coroutine works for; None outside a connection."""
    session: Session | None = getattr(_local, "session", None)
    if session is None and find_session is not None:
        return find_session()
    return session


def shutdown() -> None:
    """Ask the server that this thread works for to stop; outside a connection, every server."""
    session = current()
    for stop in [session.shutdown] if session else list(stops):
        stop()


def sleep(seconds: float) -> None:
    """As `Session.sleep` of this thread's session; a plain sleep outside a connection."""
    (current() or Session()).sleep(seconds)


def set_current(session: Session | None) -> None:
    """Say which session the running thread works for (the server does, once a thread)."""
    _local.session = session
