"""One connection's life: accept → preconnect → handshake → open → requests → close.

Runs in a thread of its own. Whatever goes wrong in it ends this connection only.
"""

from __future__ import annotations

import socket
import struct
import threading
import time

from .. import log
from ..errors import OpenError, PynbdkitError
from ..flags import CacheMode, Fua, ZeroMode
from ..protocol.constants import (
    CONTEXT_BASE,
    CONTEXT_BASE_ALLOCATION,
    FLAG_CAN_MULTI_CONN,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    REP_ERR_POLICY,
    REP_ERR_UNKNOWN,
)
from ..protocol.errors import HandshakeError
from ..protocol.handshake_server import ExportSource
from ..protocol.negotiated import ExportInfo
from ..protocol.options import BlockSize
from ..session import Session, set_current
from .negotiation import Negotiation
from .transmission import Transmission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    from ..complete import Layer
    from .server import Server

    _Answer = TypeVar("_Answer")

SO_PEERSEC = 31
"""Linux's number; the socket module has no name for it."""
MAX_LABEL = 1024
"""Bytes of a security label: the most that the socket module can be asked for."""
SLEEP_SLICE = 0.2
"""Seconds between looks, in a plugin's sleep, whether the client is still there."""


class Exports(ExportSource):
    """What the handshake asks: the chain's exports, and the one layer that is open."""

    def __init__(self, server: Server, session: Session) -> None:
        self._server = server
        self._session = session
        self._name: str | None = None
        self.layer: Layer | None = None

    def list_exports(self) -> Sequence[tuple[str, str]]:
        """For LIST. Raises HandshakeError."""
        try:
            with self._server.control_lock:
                session = self._session
                return self._server.chain.list_exports(session.readonly, session.is_tls, session)
        except BaseException as failure:  # a script may even call sys.exit()
            log.exception("list_exports", failure)
            raise HandshakeError(REP_ERR_UNKNOWN, "the exports cannot be listed") from None

    def open(self, name: str) -> ExportInfo:
        """For INFO, GO and EXPORT_NAME; the layer stays open. Raises HandshakeError."""
        return self._guard(name, self._info)

    def contexts(self, name: str, queries: Sequence[str]) -> Sequence[str]:
        """For LIST_META_CONTEXT and SET_META_CONTEXT. Raises HandshakeError.

        The export is opened only where others than the specification's context may be meant: it
        is the device that knows them.
        """
        if queries and all(query.startswith(CONTEXT_BASE) for query in queries):
            return (CONTEXT_BASE_ALLOCATION,)
        return self._guard(name, lambda layer: (CONTEXT_BASE_ALLOCATION, *layer.contexts()))

    def _guard(self, name: str, ask: Callable[[Layer], _Answer]) -> _Answer:
        """Open an export and ask something about it. Raises HandshakeError, whatever happens."""
        try:
            with self._server.control_lock:
                return ask(self._open(name))
        except BaseException as failure:
            log.exception(f"open {name!r}", failure)
            self.close()
            code = REP_ERR_POLICY if isinstance(failure, PermissionError) else REP_ERR_UNKNOWN
            known = isinstance(failure, (OSError, PynbdkitError))
            text = log.describe(failure) if known else "the export cannot be opened"
            raise HandshakeError(code, text) from None

    def _open(self, name: str) -> Layer:
        chain, session = self._server.chain, self._session
        if self.layer is None or self._name != name:
            self._close()
            self._name = name
            session.export_name = name or chain.default_export(session.readonly, session.is_tls)
            self.layer = chain.open(session)
        return self.layer

    def _info(self, layer: Layer) -> ExportInfo:
        size = layer.get_size()
        block_size = layer.block_size()
        description = layer.export_description() or ""
        return ExportInfo(
            self._session.export_name,
            size,
            transmission_flags(layer),
            description,
            BlockSize(*block_size) if any(block_size) else None,
        )

    def forget(self) -> None:
        """TLS begins: what was opened before it was opened for somebody unknown."""
        self.close()

    def close(self) -> None:
        """Close the open layer, if there is one; an error goes to the log."""
        with self._server.control_lock:
            self._close()

    def _close(self) -> None:
        layer, self.layer = self.layer, None
        if layer is not None:
            try:
                layer.close()
            except BaseException as failure:
                log.exception("close", failure)


def transmission_flags(layer: Layer) -> int:
    """What an export can, as transmission flags; each question is asked in the peer's order."""
    flags = FLAG_HAS_FLAGS
    if layer.can_write():
        if layer.can_zero() != ZeroMode.NONE:
            flags |= FLAG_SEND_WRITE_ZEROES
            if layer.can_fast_zero():
                flags |= FLAG_SEND_FAST_ZERO
        if layer.can_trim():
            flags |= FLAG_SEND_TRIM
        if layer.can_fua() != Fua.NONE:
            flags |= FLAG_SEND_FUA
    else:
        flags |= FLAG_READ_ONLY
    if layer.can_flush():
        flags |= FLAG_SEND_FLUSH
    if layer.is_rotational():
        flags |= FLAG_ROTATIONAL
    if layer.can_multi_conn():
        flags |= FLAG_CAN_MULTI_CONN
    if layer.can_cache() != CacheMode.NONE:
        flags |= FLAG_SEND_CACHE
    layer.can_extents()
    return flags


class Connection:
    """A client that was accepted."""

    def __init__(self, server: Server, sock: socket.socket, number: int) -> None:
        self._server = server
        self._sock = sock
        self._number = number
        self._negotiation: Negotiation | None = None
        self._transmission: Transmission | None = None
        self._ending = False
        self._goodbye = False
        self._killed = False
        self.session = Session(
            readonly=server.readonly,
            peer_name=_peer_name(sock),
            credentials=_credentials(sock),
            security=lambda: _security(sock),
            shutdown=server.stop,
            disconnect=self._disconnect,
            stopping=self._sleep,
        )
        self.thread = threading.Thread(target=self.run, name=f"connection-{number}", daemon=True)

    def run(self) -> None:
        """The thread's whole work."""
        set_current(self.session)
        log.set_name(f"{self._server.chain.name}[{self._number}]")
        try:
            with self._server.connection_lock:
                self._live()
        except Exception as failure:  # a bug of ours: this connection ends, the server goes on
            log.exception("connection", failure)
        finally:
            set_current(None)
            log.set_name("")
            self._sock.close()
            self._server.forget(self)

    def stop(self) -> None:
        """Finish what is running, and end (from any thread)."""
        self._ending = True
        if self._transmission is not None:
            self._transmission.stop()
        else:
            if self._negotiation is not None:
                self._negotiation.begin_shutdown()
            self._shut(socket.SHUT_RD)

    def kill(self) -> None:
        """End at once (from any thread)."""
        self._ending = self._killed = True
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # the client was quicker

    @property
    def waits_for_client(self) -> bool:
        """Whether it sends, or is in its handshake; one whose requests run ends after them."""
        return not self._killed and (self._transmission is None or self._transmission.sending)

    def cut_off(self) -> bool:
        """End it if it still waits for its client; returns whether replies are not taken."""
        if not self.waits_for_client:
            return False
        self.kill()
        return self._transmission is not None

    def _live(self) -> None:
        server = self._server
        log.debug(f"connection from {self.session.peer_name or 'a Unix socket'}")
        if self._ending or server.stopping.is_set():
            return  # it has waited for its turn, and there is none any more
        try:
            with server.control_lock:
                server.chain.preconnect(server.readonly)
        except BaseException as failure:
            log.exception("preconnect", failure)
            return
        exports = Exports(server, self.session)
        try:
            if self._negotiate(exports) and exports.layer is not None:
                self._transmit(exports.layer)
        finally:
            exports.close()

    def _negotiate(self, exports: Exports) -> bool:
        negotiation = Negotiation(self._server, self._sock, self.session, exports)
        self._negotiation = negotiation
        if self._ending:
            negotiation.begin_shutdown()
        try:
            return negotiation.run()
        finally:
            self._sock = negotiation.sock

    def _transmit(self, layer: Layer) -> None:
        server, negotiation = self._server, self._negotiation
        assert negotiation is not None
        assert negotiation.negotiated is not None
        try:
            with server.control_lock:
                transmission = Transmission(
                    self._sock,
                    layer,
                    negotiation.negotiated,
                    negotiation.leftover,
                    self.session,
                    name=server.chain.name,
                    thread_model=server.thread_model,
                    threads=server.threads,
                    lock=server.request_lock,
                    watch=server.watch,
                    carousel=server.carousel,
                )
        except OpenError as failure:
            log.error(str(failure))
            return
        self._transmission = transmission
        if self._ending:
            transmission.stop()
        why = transmission.run()
        self._goodbye = transmission.goodbye
        if why:
            log.debug(f"connection ended: {why}")

    def _disconnect(self, force: bool) -> None:
        if force:
            self.kill()
        else:
            self.stop()

    def _sleep(self, seconds: float) -> bool:
        """Sleep; True when it ended early because the server stops or the client has gone."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(deadline - time.monotonic(), 0)
            if self._server.stopping.wait(min(left, SLEEP_SLICE)) or self._gone():
                return True
            if not left:
                return False

    def _gone(self) -> bool:
        import select

        poll = select.poll()
        # Over TCP a client that closes is no hang-up; but our own `stop` looks just like it, and so
        # does a client that said goodbye and waits for our end of it.
        gone = 0 if self._ending or self._goodbye else getattr(select, "POLLRDHUP", 0)
        try:
            poll.register(self._sock, select.POLLHUP | select.POLLERR | gone)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True


def _peer_name(sock: socket.socket) -> Any:
    try:
        return sock.getpeername() or None
    except OSError:
        return None


def _credentials(sock: socket.socket) -> tuple[int, int, int] | None:
    if getattr(sock, "family", None) != socket.AF_UNIX:
        return None
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return None
    pid, uid, gid = struct.unpack("iii", packed)
    return pid, uid, gid


def _security(sock: socket.socket) -> str | None:
    try:
        label = sock.getsockopt(socket.SOL_SOCKET, SO_PEERSEC, MAX_LABEL)
    except (AttributeError, OSError):  # two pipes, or a system without labels
        return None
    return label.rstrip(b"\0").decode(errors="surrogateescape")
