"""One connection to a server: the socket, the handshake, and one request at a time.

Theory: what a call asks for is cut into requests that the server's limits allow; each request is
sent and its reply awaited before the next. The protocol's two machines (``ClientHandshake`` and
``ReplyParser``) judge what the server sends; here it only has to be carried and put together.
With extended headers lengths have 64 bits, and what carries no payload is not cut at all.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import pack
from typing import TYPE_CHECKING, Final, cast

from ..protocol import constants as nbd
from ..protocol.errors import HandshakeError, ProtocolError
from ..protocol.handshake_client import CLOSED, STARTTLS, TRANSMISSION, ClientHandshake
from ..protocol.replies import ReplyParser
from ..protocol.requests import encode_request
from .uri import Uri, parse_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from ssl import SSLSocket
    from types import TracebackType

    from ..protocol.negotiated import ExportInfo
    from ..protocol.options import BlockSize
    from ..protocol.replies import Reply

MAX_TRANSFER: Final = 32 * 1024 * 1024
"""Bytes in one read or write, where the server sets no lower limit ("Block size constraints")."""

MAX_EXTENT: Final = 2**32 - 65536
"""Bytes in one request without a payload: what 32 bits hold, aligned to any block size."""

MAX_EXTENDED: Final = 2**63
"""The same with extended headers: more than any export has."""

_RECEIVE: Final = 256 * 1024

_ERRNO: Final = {
    nbd.NBD_EPERM: errno.EPERM,
    nbd.NBD_EIO: errno.EIO,
    nbd.NBD_ENOMEM: errno.ENOMEM,
    nbd.NBD_EINVAL: errno.EINVAL,
    nbd.NBD_ENOSPC: errno.ENOSPC,
    nbd.NBD_EOVERFLOW: errno.EOVERFLOW,
    nbd.NBD_ENOTSUP: errno.ENOTSUP,
    nbd.NBD_ESHUTDOWN: errno.ESHUTDOWN,
}


def connect(
    uri: str | Uri,
    *,
    contexts: Sequence[str] = (nbd.CONTEXT_BASE_ALLOCATION,),
    structured_replies: bool = True,
    extended_headers: bool = True,
    timeout: float | None = None,
) -> Client:
    """Connect to a server and open an export.

    Arguments:
        uri: where the server is and which export to open (see ``client.uri``).
        contexts: metadata contexts to select, for `Client.block_status`.
        structured_replies: whether to ask for them; contexts and extended headers need them.
        extended_headers: whether to ask for them, for lengths of 64 bits.
        timeout: seconds that each wait for the server may take; None for no limit.

    Raises:
        UriError: the URI cannot be understood.
        OSError: nobody answers there.
        TlsError: an OSError: its files are not fit for TLS, or the server is not whom it should be.
        HandshakeError: the server refuses; the message says why.
        ProtocolError: whoever answers does not keep to the protocol.
    """
    target = parse_uri(uri) if isinstance(uri, str) else uri
    handshake = ClientHandshake(
        target.export,
        structured_replies=structured_replies,
        extended_headers=extended_headers,
        contexts=contexts,
        tls="off" if target.tls is None else "require",
    )
    return Client(negotiate(target, handshake, timeout), handshake)


def negotiate(uri: Uri, handshake: ClientHandshake, timeout: float | None = None) -> socket.socket:
    """Connect to where ``uri`` points, and carry a handshake to its end.

    Returns the socket, with TLS around it where the handshake agreed on it. Raises what `connect`
    does, with the socket closed.
    """
    if uri.tls is not None:
        from . import tls

        context = tls.context_for(uri)  # First: a mistake in the files needs no server.
    sock = open_socket(uri, timeout)
    silent = False  # Whether nothing has come over TLS yet.
    try:
        while handshake.state not in (TRANSMISSION, CLOSED):
            data = b""
            try:
                if handshake.state == STARTTLS:
                    silent = True
                    sock = tls.start(sock, context, uri)
                    _send(sock, handshake.tls_started(), True)
                data = sock.recv(_RECEIVE)
                if data:
                    silent = False
                    _send(sock, handshake.receive(data), handshake.tls)
            except OSError as error:
                if not _ends(error, handshake.tls):
                    raise
                data = b""  # The server went away; whether it might, the machine knows.
            if not data and silent:
                raise tls.left(uri)
            if not data:
                handshake.receive_eof()
        if handshake.refusal is not None:
            if handshake.refusal.code == nbd.REP_ERR_TLS_REQD and uri.tls is None:
                message = f"{handshake.refusal}: use a URI that begins with nbds"
                raise HandshakeError(nbd.REP_ERR_TLS_REQD, message)
            raise handshake.refusal
    except BaseException as error:
        sock.close()
        raise _explained(error, handshake.tls) from None
    return sock


def open_socket(uri: Uri, timeout: float | None = None) -> socket.socket:
    """Connect a socket to where ``uri`` points; raises OSError."""
    if uri.socket is None:
        sock = socket.create_connection((uri.host, uri.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(uri.socket)
    except BaseException:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket, data: bytes, tls: bool) -> None:
    """Send; a server that takes no more may have said why, which is received next."""
    try:
        sock.sendall(data)
    except OSError as error:
        if not _ends(error, tls):
            raise


def _ends(error: OSError, tls: bool) -> bool:
    """Return whether an error of the socket says that the server closed the connection."""
    if not tls:
        return isinstance(error, ConnectionError)
    from .tls import ends

    return ends(error)


class Client:
    """An open export. Offsets, counts and sizes are bytes; use it as a context manager.

    Every method raises OSError with the server's errno and message when the server reports an
    error, OSError with ENOTSUP for what the server does not offer, and ProtocolError or
    ConnectionError, after which the client is closed, when the connection is no longer sound.

    Attributes:
        export: the export's name, size, transmission flags, description and block sizes.
        contexts: names of the metadata contexts that were selected.
        structured_replies: whether they are in use.
        extended_headers: whether they are in use.
        tls: whether the connection is encrypted.
        protocol: ``"oldstyle"``, ``"newstyle"`` or ``"newstyle-fixed"``.
    """

    def __init__(self, sock: socket.socket, handshake: ClientHandshake) -> None:
        """Take over a socket whose handshake has reached TRANSMISSION."""
        negotiated = handshake.negotiated
        self.export: ExportInfo = negotiated.export
        self.structured_replies = negotiated.structured_replies
        self.extended_headers = negotiated.extended_headers
        self.tls = handshake.tls
        self.contexts = tuple(name for _, name in negotiated.contexts)
        self.protocol = handshake.protocol
        self._context_ids = {name: number for number, name in negotiated.contexts}
        self._sock: socket.socket | None = sock
        self._parser = ReplyParser(negotiated.structured_replies, negotiated.extended_headers)
        self._early = handshake.leftover
        self._cookie = 0
        maximum = self.export.block_size.maximum if self.export.block_size else 2**32 - 1
        self._transfer_limit = min(maximum, MAX_TRANSFER)
        self._maximum = maximum
        self._extent_limit = MAX_EXTENDED if self.extended_headers else MAX_EXTENT

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Size of the export in bytes."""
        return self.export.size

    @property
    def flags(self) -> int:
        """Transmission flags, ``constants.FLAG_*``."""
        return self.export.flags

    @property
    def block_size(self) -> BlockSize | None:
        """Minimum, preferred and maximum block size, if the server told them."""
        return self.export.block_size

    def read(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes from ``offset``."""
        pieces = []
        for at, length in _pieces(offset, count, self._transfer_limit):
            replies = self._request(nbd.CMD_READ, at, length)
            try:
                pieces.append(_assemble(replies, at, length))
            except ProtocolError as error:
                raise self._broken(error) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(
        self, data: bytes | bytearray | memoryview, offset: int, *, fua: bool = False
    ) -> None:
        """Write ``data`` at ``offset``; with ``fua`` it is on stable storage on return."""
        flags = self._fua(fua)
        view = memoryview(data).cast("B")
        for at, length in _pieces(offset, len(view), self._transfer_limit):
            payload = view[at - offset : at - offset + length]
            self._request(nbd.CMD_WRITE, at, length, flags, payload)

    def flush(self) -> None:
        """Put on stable storage every write that has returned."""
        self._need(nbd.FLAG_SEND_FLUSH, "flush")
        self._request(nbd.CMD_FLUSH)

    def trim(self, count: int, offset: int, *, fua: bool = False) -> None:
        """Give up the contents of ``count`` bytes at ``offset``."""
        self._need(nbd.FLAG_SEND_TRIM, "trim")
        flags = self._fua(fua)
        for at, length in _pieces(offset, count, self._extent_limit):
            self._request(nbd.CMD_TRIM, at, length, flags)

    def zero(
        self,
        count: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Make ``count`` bytes at ``offset`` zero.

        ``no_hole`` keeps them allocated; ``fast`` fails with ENOTSUP, at once, if it would be no
        faster than a write.
        """
        self._need(nbd.FLAG_SEND_WRITE_ZEROES, "zero")
        flags = self._fua(fua)
        if no_hole:
            flags |= nbd.CMD_FLAG_NO_HOLE
        if fast:
            self._need(nbd.FLAG_SEND_FAST_ZERO, "fast zero")
            flags |= nbd.CMD_FLAG_FAST_ZERO
        self._effect(nbd.CMD_WRITE_ZEROES, count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        """Tell the server that ``count`` bytes at ``offset`` will be read soon."""
        self._need(nbd.FLAG_SEND_CACHE, "cache")
        self._effect(nbd.CMD_CACHE, count, offset)

    def block_status(
        self,
        count: int,
        offset: int,
        *,
        context: str = nbd.CONTEXT_BASE_ALLOCATION,
        one: bool = False,
    ) -> list[tuple[int, int]]:
        """Return (length, status flags) of the extents from ``offset`` on, in order.

        One request is made, so the answer may end before ``count`` bytes, or reach beyond them
        unless ``one``, which asks for the first extent alone. For ``base:allocation`` the flags
        are ``constants.STATE_HOLE`` and ``STATE_ZERO``.
        """
        return self.block_statuses(count, offset, contexts=(context,), one=one)[context]

    def block_statuses(
        self, count: int, offset: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> dict[str, list[tuple[int, int]]]:
        """Return what `block_status` does for several contexts, by name, from one request.

        ``contexts`` are some of those that were selected, None for all of them. A server that
        has extended headers is asked for these alone, if it offers that; any other looks up all.
        """
        wanted = tuple(self.contexts if contexts is None else dict.fromkeys(contexts))
        for context in wanted:
            if context not in self._context_ids:
                raise OSError(errno.ENOTSUP, f"metadata context {context} was not negotiated")
        if not wanted:
            raise OSError(errno.ENOTSUP, "no metadata context was negotiated")
        _check(offset, count)
        if not count:
            return {context: [] for context in wanted}
        flags = nbd.CMD_FLAG_REQ_ONE if one else 0
        length = min(count, self._extent_limit)
        ids = self._context_ids
        payload = None
        if len(wanted) < len(ids) and self.flags & nbd.FLAG_BLOCK_STATUS_PAYLOAD:
            ids = {context: ids[context] for context in wanted}
            payload = pack(f">Q{len(ids)}I", length, *ids.values())
            flags |= nbd.CMD_FLAG_PAYLOAD_LEN
        replies = self._request(nbd.CMD_BLOCK_STATUS, offset, length, flags, payload)
        kinds = (nbd.REPLY_TYPE_BLOCK_STATUS, nbd.REPLY_TYPE_BLOCK_STATUS_EXT)
        chunks = [reply for reply in replies if reply.kind in kinds]
        if sorted(reply.context for reply in chunks) != sorted(ids.values()):
            raise self._broken(ProtocolError("block status is not given once for each context"))
        found = {reply.context: list(reply.extents) for reply in chunks}
        if one and any(len(extents) != 1 or extents[0][0] > length for extents in found.values()):
            raise self._broken(ProtocolError("block status with extents that cannot be"))
        return {context: found[ids[context]] for context in wanted}

    def close(self) -> None:
        """Say goodbye to the server and close the connection; may be called again."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        try:
            disconnect = encode_request(
                nbd.CMD_DISC, self._cookie + 1, extended=self.extended_headers
            )
            sock.sendall(disconnect)
            if self.tls:
                from .tls import say_goodbye

                say_goodbye(cast("SSLSocket", sock))
            sock.shutdown(socket.SHUT_WR)
        except OSError:  # It has gone already, or it is so stuck that it never will.
            pass
        sock.close()

    # --- One request -----------------------------------------------------------------------

    def _need(self, flag: int, what: str) -> None:
        if not self.export.flags & flag:
            raise OSError(errno.ENOTSUP, f"the server does not offer {what} for this export")

    def _fua(self, wanted: bool) -> int:
        if not wanted:
            return 0
        self._need(nbd.FLAG_SEND_FUA, "FUA")
        return nbd.CMD_FLAG_FUA

    def _request(
        self,
        kind: int,
        offset: int = 0,
        count: int = 0,
        flags: int = 0,
        payload: memoryview | bytes | None = None,
    ) -> list[Reply]:
        """Send a request, return all of its replies; raises OSError if one reports an error.

        ``count`` is what the request is about; where it and a payload differ in length, as in
        block status, the header tells the payload's.
        """
        sock = self._sock
        if sock is None:
            raise ConnectionError("the connection is closed")
        self._cookie += 1
        cookie = self._cookie
        self._parser.expect(cookie, kind, offset, count)
        replies: list[Reply] = []
        try:
            header = encode_request(
                *(kind, cookie, offset, count if payload is None else len(payload), flags),
                extended=self.extended_headers,
            )
            sock.sendall(header)
            if payload is not None:
                sock.sendall(payload)
            data, self._early = self._early, b""
            while True:
                replies += self._parser.receive(data)
                if replies and replies[-1].done:
                    break
                data = sock.recv(_RECEIVE)
                if not data:
                    raise ConnectionError("the server closed the connection")
        except (OSError, ProtocolError) as error:
            raise self._broken(_explained(error, self.tls)) from None
        for reply in replies:
            if reply.error:
                number = _ERRNO.get(reply.error, errno.EINVAL)  # "Error values".
                raise OSError(number, reply.message or os.strerror(number))
        return replies

    def _effect(self, kind: int, count: int, offset: int, flags: int = 0) -> None:
        """Send a request whose length is not a payload's, cut where the server wants it cut.

        A server may refuse more than its maximum there, too, so that without extended headers it is
        always kept. With them, which are there for large lengths, it is kept when asked for.
        """
        if self.extended_headers and self._maximum < count <= MAX_EXTENDED:
            try:
                self._request(kind, offset, count, flags)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOVERFLOW) or self._sock is None:
                    raise
        for at, length in _pieces(offset, count, min(self._maximum, MAX_EXTENT)):
            self._request(kind, at, length, flags)

    def _broken(self, error: BaseException) -> BaseException:
        """Close a connection on which nothing can be trusted any more; return ``error``."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        return error


def _pieces(offset: int, count: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a range into offsets and lengths of at most ``limit`` bytes."""
    _check(offset, count)
    for start in range(0, count, limit):
        yield offset + start, min(limit, count - start)


def _check(offset: int, count: int) -> None:
    if offset < 0 or count < 0:
        raise ValueError(f"offset {offset} and count {count} must not be negative")


def _explained(error: BaseException, tls: bool) -> BaseException:
    """Return an error of the TLS layer in words for the user, any other as it is."""
    if not tls:
        return error
    from .tls import explained

    return explained(error) if isinstance(error, OSError) else error


def _assemble(replies: list[Reply], offset: int, count: int) -> bytes:
    """Put the data and holes of a read together; raises ProtocolError if they do not fit."""
    if len(replies) == 1 and len(replies[0].data) == count:
        return replies[0].data
    content = [reply for reply in replies if reply.data or reply.length]
    content.sort(key=lambda reply: reply.offset)
    pieces = []
    at = offset
    for reply in content:
        if reply.offset != at:
            break
        pieces.append(reply.data or bytes(reply.length))
        at += len(pieces[-1])
    if at != offset + count or len(pieces) != len(content):
        raise ProtocolError(f"the chunks of a read of {count} bytes overlap or leave a gap")
    return b"".join(pieces)


__all__ = ["Client", "HandshakeError", "connect", "negotiate", "open_socket"]
