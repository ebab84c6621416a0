"""SecureStream: TLS over a socket, with the methods of a socket that a connection uses.

Theory. A connection's threads send and receive at the same time, and OpenSSL's objects stand one
thread at a time. So TLS runs in memory: an `SSLObject` between two `MemoryBIO`s, under a lock that
is held for the computing alone. What comes and goes on the wire is received and sent outside of it:

- *receiving* (one thread at a time, the reader): large raw receives; then every record that is
  there is decrypted straight into the caller's buffer, so that a batch of requests that came
  together arrives together.
- *sending*: `_wire` is held from encrypting to sending, so records leave in the order in which they
  were numbered. A gather write becomes full records, and one raw send for many of them.

What TLS itself has to say (alerts) may come up while receiving. The reader sends it if that is
possible without waiting; else it goes with what is sent next. So a client that does not read stops
its senders and nobody else; if it makes TLS say more and more all the same, it is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Final

from ..heap import LARGE, keep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Buffer = bytes | bytearray | memoryview

RECORD: Final = 16384
"""Bytes of data in a full record (RFC 8446, section 5.1)."""
SMALL_RECEIVE: Final = 32 << 10
"""What is received at once, at first: an idle connection is not to cost much."""
LARGE_RECEIVE: Final = 256 << 10
"""What is received at once on a busy connection."""
AT_ONCE: Final = 128 << 10
"""Bytes that are encrypted before they are sent: less than the kernel takes, so that the client
decrypts what it has while we encrypt more."""
LARGE_PIECE: Final = 4 * RECORD
"""Pieces of at least this many bytes are not joined with others, but for their ends."""
MOST_UNSENT: Final = 64 << 10
"""Bytes that TLS may have to say to a client that does not read."""


class SecureStream:
    """A connection's socket after STARTTLS; `handshake` has to succeed before anything else."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, first: bytes = b"") -> None:
        """`first`: bytes that were received after the request for TLS, and belong to it."""
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._incoming.write(first)
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()  # the TLS object and both its ends
        self._wire = threading.Lock()  # the right to send
        self._unsent: Buffer = b""  # what of it was encrypted, and could not be sent
        self._raw = memoryview(bytearray(SMALL_RECEIVE))
        self._ended = False  # nothing more is to be received
        self._failure: OSError | None = None  # why, where it was no orderly end
        self._more = False
        self._closed = False

    # -- what the connection does at first -------------------------------------------------------

    def handshake(self) -> None:
        """Run the TLS handshake. Raises ssl.SSLError, OSError, EOFError when the client goes.

        After a failure, `close` still tells the client of it.
        """
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_raw(self._outgoing.read())
            else:
                break
            count = self._sock.recv_into(self._raw)
            if not count:
                raise EOFError
            self._incoming.write(self._raw[:count])
        self._send_raw(self._outgoing.read())

    def use(self, sock: socket.socket) -> None:
        """Go on with another object for the same socket (one without a time limit)."""
        self._sock = sock

    # -- a socket's methods ----------------------------------------------------------------------

    @property
    def family(self) -> int:
        """The address family of the socket."""
        return self._sock.family

    def fileno(self) -> int:
        """The descriptor: readable when ciphertext waits (see `pending` for the rest)."""
        return self._sock.fileno()

    def getpeername(self) -> Any:
        """The client's address."""
        return self._sock.getpeername()

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        """An option of the socket."""
        return self._sock.getsockopt(level, option, size)

    def settimeout(self, seconds: float | None) -> None:
        """Limit the time of each raw operation."""
        self._sock.settimeout(seconds)

    def pending(self) -> bool:
        """Whether data waits that the descriptor does not tell of."""
        return self._more

    @property
    def pollable(self) -> bool:
        """Whether `recv_into` can be asked not to wait."""
        return type(self._sock) is socket.socket

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Receive what there is, or with MSG_WAITALL all that was asked for; 0 at the end.

        With MSG_DONTWAIT (where it is `pollable`) raises BlockingIOError when there is nothing.
        For one thread at a time. Raises OSError when the client breaks the rules of TLS.
        """
        view = memoryview(buffer)
        if nbytes:
            view = view[:nbytes]
        size = len(view)
        filled = 0
        while True:
            if not self._ended:
                filled = self._decrypt(view, filled, size)
            if filled == size or (filled and not flags & socket.MSG_WAITALL):
                return filled
            if self._ended:
                if self._failure is not None and not filled:
                    raise self._failure
                return filled
            self._receive(flags & socket.MSG_DONTWAIT)

    def sendmsg(self, pieces: Sequence[Buffer]) -> int:
        """Encrypt and send all pieces; returns how many bytes they are. Raises OSError."""
        total = 0
        with self._wire:
            batch: list[Buffer] = []
            size = 0
            for piece in self._records(pieces):
                batch.append(piece)
                size += len(piece)
                if size >= AT_ONCE:
                    self._encrypt_and_send(batch)
                    total += size
                    batch, size = [], 0
            if batch:
                self._encrypt_and_send(batch)
                total += size
        if self._outgoing.pending:
            self._send_what_is_possible()
        return total

    def shutdown(self, how: int) -> None:
        """As a socket's."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Say that this is the end, if that is possible without waiting, and close the socket."""
        if not self._closed:
            self._closed = True
            self._say_last()
        self._sock.close()

    # -- receiving -------------------------------------------------------------------------------

    def _decrypt(self, view: memoryview, filled: int, size: int) -> int:
        """Fill `view` from `filled` on with the data of all records; returns where it ends."""
        incoming = self._incoming
        read = self.tls.read
        with self._lock:
            try:
                while filled < size:
                    count: Any = read(size - filled, view[filled:])
                    if not count:  # the client has said goodbye
                        self._ended = True
                        break
                    filled += count
                    if filled < size and not incoming.pending:
                        break  # spares the exception that would say so
                else:
                    self._more = bool(self.tls.pending() or incoming.pending)
                    return filled
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._ended = True
            except ssl.SSLError as error:
                self._ended = True
                text = (error.reason or "broken").replace("_", " ").lower()
                self._failure = OSError(errno.EPROTO, f"TLS: {text}")
            self._more = False
        if self._outgoing.pending:
            self._send_what_is_possible()
            if self._outgoing.pending > MOST_UNSENT and not self._ended:
                self._ended = True
                self._failure = OSError(errno.EPROTO, "TLS: the client makes noise, and is deaf")
        return filled

    def _receive(self, flags: int) -> None:
        """Receive ciphertext: what there is."""
        raw = self._raw
        count = self._sock.recv_into(raw, 0, flags) if flags else self._sock.recv_into(raw)
        if not count:
            self._ended = True
            return
        with self._lock:
            self._incoming.write(raw[:count])
        if count == len(raw) < LARGE_RECEIVE:
            self._raw = memoryview(bytearray(LARGE_RECEIVE))

    # -- sending ---------------------------------------------------------------------------------

    def _records(self, pieces: Sequence[Buffer]) -> list[Buffer]:
        """The same bytes in few pieces: each becomes records of its own, which should be full.

        Small pieces are joined. A large one gives its head to complete the record before it, and is
        then encrypted where it is.
        """
        result: list[Buffer] = []
        small: list[Buffer] = []
        size = 0
        for piece in pieces:
            length = len(piece)
            if length < LARGE_PIECE:
                small.append(piece)
                size += length
                continue
            view = memoryview(piece)
            head = -size % RECORD
            if head:
                small.append(view[:head])
            if small:
                result.append(b"".join(small))
            end = head + (length - head) // RECORD * RECORD
            for start in range(head, end, AT_ONCE):
                result.append(view[start : min(start + AT_ONCE, end)])
            small, size = ([view[end:]], length - end) if end < length else ([], 0)
        if small:
            result.append(b"".join(small))
        return result

    def _encrypt_and_send(self, batch: Sequence[Buffer]) -> None:
        """Call it with `_wire`."""
        with self._lock:
            try:
                for piece in batch:
                    self.tls.write(piece)
            except ssl.SSLError as error:
                raise BrokenPipeError(errno.EPIPE, f"TLS: {error.reason or 'broken'}") from None
            data = self._outgoing.read()
        if len(data) >= LARGE:
            keep()  # what was encrypted is freed when it is sent, and wanted again at once
        if self._unsent:
            data = b"".join((self._unsent, data))
            self._unsent = b""
        self._send_raw(data)

    def _send_raw(self, data: bytes) -> None:
        view = memoryview(data)
        sendmsg = self._sock.sendmsg
        while view:
            view = view[sendmsg([view]) :]

    def _send_what_is_possible(self) -> None:
        """Send what TLS has to say, without waiting: a thread that is sending takes it along."""
        while self._outgoing.pending and self._wire.acquire(blocking=False):
            try:
                with self._lock:
                    data: Buffer = self._outgoing.read() if len(self._unsent) < MOST_UNSENT else b""
                    data = b"".join((self._unsent, data))
                sent = self._try_to_send(data)
                self._unsent = memoryview(data)[sent:]
                if self._unsent:
                    return
            finally:
                self._wire.release()

    def _try_to_send(self, data: Buffer) -> int:
        send: Callable[[Buffer, int], int] | None = getattr(self._sock, "send", None)
        if send is None:
            return 0  # a pipe: it has to wait for somebody who may wait
        try:
            return send(data, socket.MSG_DONTWAIT)
        except OSError:
            return 0  # it takes nothing now; if it has gone, the next one who sends will see

    def _say_last(self) -> None:
        """Send the alert that waits, or else that this is the end; nobody uses the stream now."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self.tls.unwrap()  # raises, if only to say that the client has not answered yet
        if self._wire.acquire(blocking=False):
            with contextlib.suppress(OSError):
                self._sock.settimeout(0)
                self._sock.sendmsg([self._unsent, self._outgoing.read()])
            with contextlib.suppress(OSError):
                self._sock.settimeout(None)  # the one who gave us stdin has the same socket
            self._wire.release()
