"""Negotiation: from the greeting to the transmission phase, TLS included, within a time limit.

The bytes are `ServerHandshake`'s; here is what moves them. The limit is one for the whole
negotiation, wherever the client stalls: each operation on the socket gets what is left of it.
"""

from __future__ import annotations

import time

from .. import log
from ..protocol.errors import HandshakeError
from ..protocol.handshake_server import (
    CLOSED,
    STARTTLS,
    TRANSMISSION,
    ServerHandshake,
    oldstyle,
    oldstyle_negotiated,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any

    from ..protocol.negotiated import Negotiated
    from ..session import Session
    from .connection import Exports
    from .server import Server


class Limited:
    """A socket whose operations raise TimeoutError when they end after a deadline."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        """`seconds` from now."""
        self._sock = sock
        self._deadline = time.monotonic() + seconds
        self.family = sock.family

    def _arm(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """As a socket's. Raises TimeoutError."""
        self._arm()
        return self._sock.recv_into(buffer)

    def sendmsg(self, pieces: Sequence[bytes | memoryview]) -> int:
        """As a socket's. Raises TimeoutError."""
        self._arm()
        return self._sock.sendmsg(pieces)


class Negotiation:
    """One connection's negotiation.

    Attributes: `sock`, what to use from now on in place of the socket (it changes at STARTTLS);
    `negotiated` and `leftover`, for the transmission phase.
    """

    def __init__(
        self, server: Server, sock: socket.socket, session: Session, exports: Exports
    ) -> None:
        self._server = server
        self._raw = sock
        self._session = session
        self._exports = exports
        self._limit = server.handshake_timeout
        self._wire: Any = Limited(sock, self._limit) if self._limit else sock
        self._machine = ServerHandshake(
            exports,
            structured_replies=server.structured_replies,
            meta_contexts=server.meta_contexts,
            extended_headers=server.extended_headers,
            fixed=bool(server.handshake_mask & 1),
            no_zeroes=bool(server.handshake_mask & 2),
            tls=server.tls,
        )
        self.sock: Any = sock
        self.negotiated: Negotiated | None = None
        self.leftover = b""

    def begin_shutdown(self) -> None:
        """The server stops: refuse what is asked from now on (from any thread)."""
        self._machine.begin_shutdown()

    def run(self) -> bool:
        """Negotiate; False where it came to nothing, after a line in the log that says why."""
        try:
            done = self._oldstyle() if self._server.oldstyle else self._newstyle()
        except TimeoutError:
            log.error(f"handshake: the client has not ended it within {self._limit:g} seconds")
            return False
        except OSError as error:
            log.debug(f"handshake: {error.strerror or error}")
            return False
        finally:
            if self.sock is not self._raw:
                self.sock.use(self._raw)
        if done and self._limit:
            self._raw.settimeout(None)
        return done

    def _oldstyle(self) -> bool:
        if self._server.tls == "require":
            log.error("handshake: the oldstyle handshake has no TLS, which is required")
            return False
        try:
            export = self._exports.open("")
        except HandshakeError as error:
            log.error(f"handshake: {error.message}")
            return False
        self._send(oldstyle(export))
        self.negotiated = oldstyle_negotiated(export)
        return True

    def _newstyle(self) -> bool:
        machine = self._machine
        self._send(machine.greeting())
        buffer = memoryview(bytearray(4096))
        while machine.state not in (TRANSMISSION, CLOSED):
            count = self._wire.recv_into(buffer)
            if not count:
                log.debug("client has gone during the handshake")
                return False
            reply = machine.receive(buffer[:count])
            while reply:  # a long answer comes in pieces
                self._send(reply)
                reply = machine.receive(b"")
            if machine.state == STARTTLS:
                if not self._start_tls(machine.leftover):
                    return False
                machine.tls_started()
        if machine.state == CLOSED:
            if machine.error:
                log.error(f"handshake: {machine.error}")
            return False
        self.negotiated, self.leftover = machine.negotiated, machine.leftover
        return True

    def _start_tls(self, first: bytes) -> bool:
        """Run TLS's own handshake; `first` came behind the request for it."""
        import ssl

        from ..tls import peer_names, why_refused
        from .secure import SecureStream

        credentials = self._server.credentials
        assert credentials is not None
        stream = SecureStream(self._wire, credentials.context(), first)
        self.sock = stream
        try:
            stream.handshake()
        except TimeoutError:
            raise
        except ssl.SSLError as error:
            log.error(f"TLS: {why_refused(error, credentials)}")
            return False
        except (OSError, EOFError):
            log.error("TLS: the client has gone during the handshake: does it trust this server?")
            return False
        session = self._session
        session.is_tls = True
        session.peer_tls_dn, session.peer_tls_issuer_dn = peer_names(stream.tls.getpeercert())
        session.peer_tls_user = credentials.user()[0]
        log.debug(f"{stream.tls.version()} with {(stream.tls.cipher() or ('?',))[0]}")
        self._wire = stream
        return True

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._wire.sendmsg([view]) :]
