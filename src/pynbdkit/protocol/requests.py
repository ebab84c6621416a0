"""Requests of the transmission phase: the client's encoder, the server's parser.

Theory: `RequestParser` owns one large buffer. Bytes are received straight into `space()`; after
`received(n)`, `requests()` returns everything complete in the buffer at once. A write's payload is
a memoryview of the buffer: nothing is copied, and so a batch's payloads are valid until the next
call of `space()` (of `turn_over()`, if it is called before; or for good after `detach()`, which
leaves them the old buffer). A request at the beginning of a large buffer has its payload where
memory is copied fastest (`ALIGNMENT`).

A request is a plain tuple, because it is made once per request on the hot path:
``(flags, kind, cookie, offset, count, payload)``; `payload` is None but for a write, and for a
write over the limit, whose payload is skipped as it arrives, without being stored.

With extended headers the flag PAYLOAD_LEN says whether a payload follows. A write comes out without
the flag, so that it looks the same in both forms, and has its payload even if the client forgot the
flag that it must set: QEMU 10 does, and its data must not be taken for requests. All others keep
the flag: `count` is then the length of their payload.
"""

from __future__ import annotations

from struct import Struct

from .constants import (
    CMD_FLAG_PAYLOAD_LEN,
    CMD_WRITE,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Request = tuple[int, int, int, int, int, memoryview | None]

REQUEST: Final = Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length (NBD protocol, "Request message")."""
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""The same with a length of 64 bits ("Extended request")."""

FIRST_BUFFER: Final = 4 * 1024
"""What a connection begins with, and what an idle one has."""
SMALL_BUFFER: Final = 64 * 1024
"""What it grows to when it has something to do."""
LARGE_BUFFER: Final = 2 * 1024 * 1024
"""What a busy connection's buffer grows to; more only while larger writes arrive."""
ONCE_MORE: Final = 16
"""So often a buffer that a larger write has made is used after it: another one may follow, and new
memory for each would take longer than the rest."""
MAPPED_BUFFER: Final = 128 * 1024
"""From this size on a buffer is a mapping of its own: what no byte has come to costs no memory, so
that a large write costs what was sent of it, not what was announced."""
ALIGNMENT: Final = 64
"""Memory at a multiple of this is copied fastest: 28 bytes off it took up to twice as long."""
FEW_REQUESTS: Final = 64
"""A buffer that is filled by fewer requests than this grows: more of them would fill a batch."""
MANY_REQUESTS: Final = 4096
"""A buffer that had more requests than this shrinks: what they take as objects is bounded, too."""


def encode_request(
    kind: int,
    cookie: int,
    offset: int = 0,
    count: int = 0,
    flags: int = 0,
    *,
    extended: bool = False,
) -> bytes:
    """The 28 bytes of a request, 32 if `extended`; a write's payload follows them.

    With extended headers a write is given PAYLOAD_LEN, as it must have.
    """
    if not extended:
        return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, count)
    if kind == CMD_WRITE:
        flags |= CMD_FLAG_PAYLOAD_LEN
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, count)


class RequestParser:
    """Bytes from a client to requests; any split of the bytes gives the same requests."""

    def __init__(
        self, first: bytes = b"", max_payload: int = MAX_PAYLOAD, extended: bool = False
    ) -> None:
        """`first`: bytes that came with the end of the handshake; `extended`: its headers."""
        self._max_payload = max_payload
        self._extended = extended
        self._header = EXTENDED_REQUEST.size if extended else REQUEST.size
        self._view: memoryview
        self._spare: memoryview | None  # a second buffer, with the payloads of before
        self._size: int  # of each
        self._renew(max(FIRST_BUFFER, len(first)))
        self._view[: len(first)] = first
        self._start = 0  # first byte that is not parsed
        self._end = len(first)  # first byte that is not received
        self._need = self._header  # bytes from _start that the next request needs
        self._skip = 0  # bytes of an oversized payload still to come
        self._aim = FIRST_BUFFER  # the size that the buffer should have, next time
        self._keep = 0  # how often it is still used, when that is more than LARGE_BUFFER
        self.broken = ""
        """Why nothing more can be understood (a wrong magic number); "" as long as all is well."""

    @property
    def partial(self) -> bool:
        """Whether a request has begun and is not complete."""
        return self._end > self._start or self._skip > 0

    @property
    def missing(self) -> int:
        """How many bytes complete the request that has begun; 0 where none has."""
        return self._need - (self._end - self._start) if self._end > self._start else 0

    def space(self) -> memoryview:
        """Where the next bytes go: never empty. Ends the life of earlier payloads."""
        start, end, need = self._start, self._end, self._need
        if need > LARGE_BUFFER:
            self._keep = ONCE_MORE
        elif self._aim > LARGE_BUFFER:
            self._keep -= 1
            if not self._keep:
                self._aim = LARGE_BUFFER
        if need > self._aim:
            self._aim = max(need, SMALL_BUFFER)
        size = self._aim
        if size != self._size and end - start < size:
            tail = self._view[start:end]
            self._renew(size)
            start, end = 0, len(tail)
            self._view[:end] = tail
        elif start == end:
            start = end = 0
        elif start and (
            need > self._size - start or self._size - end < min(self._size, SMALL_BUFFER) // 2
        ):
            tail_bytes = bytes(self._view[start:end])
            start, end = 0, len(tail_bytes)
            self._view[:end] = tail_bytes
        self._start, self._end = start, end
        return self._view[end:]

    def received(self, count: int) -> None:
        """`count` bytes were put into `space()`."""
        self._end += count

    def requests(self) -> list[Request]:
        """Every request that is complete, up to a wrong magic number (see `broken`)."""
        if self._skip:
            skipped = min(self._skip, self._end - self._start)
            self._skip -= skipped
            self._start += skipped
        result = self._parse_extended() if self._extended else self._parse()
        if self._end == self._size and (len(result) < FEW_REQUESTS or self._size < SMALL_BUFFER):
            self._aim = max(self._aim, min(max(4 * self._aim, SMALL_BUFFER), LARGE_BUFFER))
        elif len(result) > MANY_REQUESTS:
            self._aim = SMALL_BUFFER
        return result

    def _parse(self) -> list[Request]:
        view, start, end = self._view, self._start, self._end
        result: list[Request] = []
        append = result.append
        unpack = REQUEST.unpack_from
        self._need = 28
        while end - start >= 28:
            magic, flags, kind, cookie, offset, count = unpack(view, start)
            if magic != REQUEST_MAGIC:
                # What came before is good and is answered; nothing after it can be understood.
                self.broken = f"request with magic number {magic:#x}, not {REQUEST_MAGIC:#x}"
                break
            if kind == CMD_WRITE and count:
                stop = start + 28 + count
                if stop > end:
                    if count > self._max_payload:
                        self._skip = stop - end
                        stop = end
                        append((flags, kind, cookie, offset, count, None))
                        start = stop
                        break
                    self._need = 28 + count
                    break
                payload = view[start + 28 : stop] if count <= self._max_payload else None
                append((flags, kind, cookie, offset, count, payload))
                start = stop
            else:
                append((flags, kind, cookie, offset, count, None))
                start += 28
        self._start = start
        return result

    def _parse_extended(self) -> list[Request]:
        """As `_parse`; a payload is where the flag says so, and behind every write."""
        view, start, end = self._view, self._start, self._end
        result: list[Request] = []
        append = result.append
        unpack = EXTENDED_REQUEST.unpack_from
        self._need = 32
        while end - start >= 32:
            magic, flags, kind, cookie, offset, count = unpack(view, start)
            if magic != EXTENDED_REQUEST_MAGIC:
                self.broken = f"request with magic number {magic:#x}, not the extended one"
                break
            if not (count and (kind == CMD_WRITE or flags & CMD_FLAG_PAYLOAD_LEN)):
                append((flags, kind, cookie, offset, count, None))
                start += 32
                continue
            if kind == CMD_WRITE:
                flags &= ~CMD_FLAG_PAYLOAD_LEN
            stop = start + 32 + count
            payload = view[start + 32 : stop] if count <= self._max_payload else None
            if stop > end:
                if payload is not None:
                    self._need = 32 + count
                    break
                self._skip = stop - end
                stop = end
            append((flags, kind, cookie, offset, count, payload))
            start = stop
        self._start = start
        return result

    def turn_over(self) -> None:
        """Go on in a second buffer: the payloads of now are valid until it is called again.

        For when no request has begun (`partial`): what has begun is not taken along. Raises
        MemoryError, and then nothing has changed.
        """
        if self._size != self._aim:
            self._renew(self._aim)  # and there is no second one of that size yet
        else:
            view, spare = self._view, self._spare
            if spare is None:
                self._renew(self._size)
            else:
                self._view = spare
            self._spare = view
        self._start = self._end = 0

    def detach(self) -> None:
        """Leave the buffer to the requests that were parsed, and go on in a new one."""
        tail = self._view[self._start : self._end]
        self._renew(max(min(self._size, LARGE_BUFFER), self._need, len(tail)))
        self._view[: len(tail)] = tail
        self._start, self._end = 0, len(tail)

    @property
    def large(self) -> bool:
        """Whether the buffer is larger than an idle connection needs."""
        return self._size > FIRST_BUFFER

    def shrink(self) -> None:
        """Nothing has come for long: the next `space` is small, unless a request has begun."""
        self._aim = FIRST_BUFFER

    def close(self) -> None:
        """Give the buffer back: whoever may still know this parser keeps no memory with it."""
        self._view = memoryview(b"")
        self._spare = None
        self._size = self._start = self._end = 0

    def _renew(self, size: int) -> None:
        if size < MAPPED_BUFFER:
            view = memoryview(bytearray(size))
        else:
            from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

            try:
                lead = -self._header % ALIGNMENT
                mapping = mmap(-1, lead + size, MAP_PRIVATE | MAP_ANONYMOUS)
            except OSError:  # not one of a socket, for whoever receives
                raise MemoryError from None
            view = memoryview(mapping)[lead:]
        self._view, self._size, self._spare = view, size, None
