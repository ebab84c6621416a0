"""Replies of the transmission phase: the server's encoders, the client's parser.

A simple reply is a header (and a read's data). A structured reply is one or more chunks, the last
one marked DONE. Once structured replies were negotiated, a read is answered by chunks alone (NBD
protocol, "Structured replies"); once extended headers were, every reply is made of chunks, whose
header is longer and tells the request's offset again. The encoders of chunks take that offset as
`at`: None stands for structured replies without extended headers. The server's hot path packs
`SIMPLE`, `DATA` and their extended forms itself.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError

from .constants import (
    CMD_BLOCK_STATUS,
    CMD_READ,
    EXTENDED_REPLY_MAGIC,
    MAX_PAYLOAD,
    MAX_STRING,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_FLAG_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from .errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final, NamedTuple
else:
    from ._record import NamedTuple

SIMPLE: Final = Struct(">IIQ")
"""magic, error, cookie."""
CHUNK: Final = Struct(">IHHQI")
"""magic, flags, type, cookie, length of what follows."""
DATA: Final = Struct(">IHHQIQ")
"""CHUNK with the offset that OFFSET_DATA begins with; the data follows."""
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
"""magic, flags, type, cookie, the request's offset, length of what follows."""
EXTENDED_DATA: Final = Struct(">IHHQQQQ")
"""EXTENDED_CHUNK with the offset that OFFSET_DATA begins with; the data follows."""
_HOLE: Final = Struct(">QI")
_ERROR: Final = Struct(">IH")
_STATUS: Final = Struct(">II")
_EXTENDED_STATUS: Final = Struct(">QQ")
_OFFSET: Final = Struct(">Q")
MAX_CHUNK: Final = MAX_PAYLOAD + 8
"""The longest chunk that a client takes."""


def encode_simple(cookie: int, error: int = 0) -> bytes:
    """A simple reply; a read's data follows it."""
    return SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def _header(done: bool, kind: int, cookie: int, length: int, at: int | None) -> bytes:
    if at is None:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, length)
    return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, int(done), kind, cookie, at, length)


def encode_none(cookie: int, at: int | None = None) -> bytes:
    """The chunk that ends a reply and says nothing."""
    return _header(True, REPLY_TYPE_NONE, cookie, 0, at)


def encode_data(
    cookie: int, offset: int, length: int, done: bool = True, at: int | None = None
) -> bytes:
    """Header of an OFFSET_DATA chunk; `length` bytes of data follow it."""
    return _header(done, REPLY_TYPE_OFFSET_DATA, cookie, length + 8, at) + _OFFSET.pack(offset)


def encode_hole(
    cookie: int, offset: int, length: int, done: bool = True, at: int | None = None
) -> bytes:
    """An OFFSET_HOLE chunk: `length` zeros."""
    return _header(done, REPLY_TYPE_OFFSET_HOLE, cookie, 12, at) + _HOLE.pack(offset, length)


def encode_error(
    cookie: int,
    error: int,
    message: str = "",
    offset: int | None = None,
    at: int | None = None,
) -> bytes:
    """An error chunk that ends the reply, with a message for people and, for reads, the offset."""
    text = message.encode("utf-8", "replace")[:MAX_STRING].decode("utf-8", "ignore").encode()
    body = _ERROR.pack(error, len(text)) + text
    kind = REPLY_TYPE_ERROR
    if offset is not None:
        kind = REPLY_TYPE_ERROR_OFFSET
        body += _OFFSET.pack(offset)
    return _header(True, kind, cookie, len(body), at) + body


def encode_status(
    cookie: int,
    context: int,
    extents: Iterable[tuple[int, int]],
    done: bool = True,
    at: int | None = None,
) -> bytes:
    """The chunk of one context: (length, status flags) pairs, in 64 bits with extended headers.

    Raises OverflowError for a length or flags that do not fit.
    """
    pairs = _STATUS if at is None else _EXTENDED_STATUS
    try:
        packed = [pairs.pack(length, flags) for length, flags in extents]
    except StructError:
        raise OverflowError("a status that needs more bits than the reply has") from None
    body = b"".join(packed)
    if at is None:
        body = context.to_bytes(4, "big") + body
        kind = REPLY_TYPE_BLOCK_STATUS
    else:
        body = _STATUS.pack(context, len(packed)) + body
        kind = REPLY_TYPE_BLOCK_STATUS_EXT
    return _header(done, kind, cookie, len(body), at) + body


class Reply(NamedTuple):
    """One simple reply or one chunk, as a client understands it.

    `kind` is None for a simple reply, else REPLY_TYPE_*. `error` is 0 or the protocol's errno;
    `data` is what was read; `length` counts zeros (OFFSET_HOLE); `context` and `extents` belong to
    BLOCK_STATUS and BLOCK_STATUS_EXT.
    """

    cookie: int
    done: bool
    kind: int | None
    error: int = 0
    message: str = ""
    offset: int = 0
    data: bytes = b""
    length: int = 0
    context: int = 0
    extents: tuple[tuple[int, int], ...] = ()


class ReplyParser:
    """Bytes from a server to replies; any split of the bytes gives the same replies.

    The caller says what it has sent (`expect`), because a simple reply's length follows from its
    request. Raises ProtocolError where the server breaks the protocol.
    """

    def __init__(self, structured: bool, extended: bool = False) -> None:
        """Whether structured replies, and extended headers, were negotiated."""
        self._structured = structured
        self._extended = extended
        self._buffer = bytearray()
        self._expected: dict[int, tuple[int, int, int]] = {}

    def expect(self, cookie: int, kind: int, offset: int = 0, count: int = 0) -> None:
        """A request was sent."""
        self._expected[cookie] = (kind, offset, count)

    @property
    def waiting(self) -> int:
        """How many requests have no reply yet."""
        return len(self._expected)

    def receive(self, data: bytes | bytearray | memoryview) -> list[Reply]:
        """Take bytes, return every reply or chunk that is complete."""
        self._buffer += data
        result = []
        position = 0
        while True:
            step = self._next(position)
            if step is None:
                break
            reply, position = step
            result.append(reply)
        del self._buffer[:position]
        return result

    def _next(self, at: int) -> tuple[Reply, int] | None:
        buffer = self._buffer
        if len(buffer) - at < 4:
            return None
        magic = int.from_bytes(buffer[at : at + 4], "big")
        if magic == EXTENDED_REPLY_MAGIC and self._extended:
            return self._chunk(at, EXTENDED_CHUNK.size)
        if magic == SIMPLE_REPLY_MAGIC and not self._extended:
            return self._simple(at)
        if magic == STRUCTURED_REPLY_MAGIC and self._structured and not self._extended:
            return self._chunk(at, CHUNK.size)
        raise ProtocolError(f"reply with magic number {magic:#x}")

    def _request_of(self, cookie: int) -> tuple[int, int, int]:
        try:
            return self._expected[cookie]
        except KeyError:
            raise ProtocolError(f"reply to cookie {cookie:#x}, which was not asked for") from None

    def _simple(self, at: int) -> tuple[Reply, int] | None:
        if len(self._buffer) - at < SIMPLE.size:
            return None
        _, error, cookie = SIMPLE.unpack_from(self._buffer, at)
        kind, offset, count = self._request_of(cookie)
        if self._structured and (kind == CMD_READ or (kind == CMD_BLOCK_STATUS and not error)):
            raise ProtocolError("simple reply to a read or block status, not a structured one")
        at += SIMPLE.size
        data = b""
        if kind == CMD_READ and not error:
            if len(self._buffer) - at < count:
                return None
            data = bytes(self._buffer[at : at + count])
            at += count
        del self._expected[cookie]
        return Reply(cookie, True, None, error, offset=offset, data=data), at

    def _chunk(self, at: int, size: int) -> tuple[Reply, int] | None:
        if len(self._buffer) - at < size:
            return None
        if self._extended:
            _, flags, kind, cookie, echo, length = EXTENDED_CHUNK.unpack_from(self._buffer, at)
        else:
            _, flags, kind, cookie, length = CHUNK.unpack_from(self._buffer, at)
        request = self._request_of(cookie)
        if length > MAX_CHUNK:
            raise ProtocolError(f"chunk of {length} bytes, more than {MAX_CHUNK}")
        if self._extended and echo != request[1]:
            raise ProtocolError(f"reply for offset {echo} to a request at {request[1]}")
        at += size
        if len(self._buffer) - at < length:
            return None
        done = bool(flags & REPLY_FLAG_DONE)
        try:
            reply = self._decode(cookie, done, kind, bytes(self._buffer[at : at + length]), request)
        except (StructError, UnicodeDecodeError, IndexError):
            raise ProtocolError(f"chunk of type {kind} with {length} bytes") from None
        if done:
            del self._expected[cookie]
        return reply, at + length

    def _decode(
        self, cookie: int, done: bool, kind: int, body: bytes, request: tuple[int, int, int]
    ) -> Reply:
        if kind == REPLY_TYPE_NONE:
            if body or not done:
                raise ProtocolError("chunk of type NONE with data, or not the last")
            return Reply(cookie, done, kind)
        command, start, count = request
        if kind & REPLY_TYPE_FLAG_ERROR:
            error, length = _ERROR.unpack_from(body)
            message = body[6 : 6 + length].decode("utf-8", "replace")
            rest = body[6 + length :]
            offset = _OFFSET.unpack(rest)[0] if kind == REPLY_TYPE_ERROR_OFFSET else 0
            if len(body) < 6 + length or not error or (kind == REPLY_TYPE_ERROR and rest):
                raise ProtocolError(f"error chunk of {len(body)} bytes, message of {length}")
            if kind == REPLY_TYPE_ERROR_OFFSET and not start <= offset < start + count:
                raise ProtocolError(f"error at {offset}, outside of the request")
            return Reply(cookie, done, kind, error, message, offset)
        if kind == (REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else REPLY_TYPE_BLOCK_STATUS):
            return self._status(cookie, done, kind, body, command)
        if kind not in (REPLY_TYPE_OFFSET_DATA, REPLY_TYPE_OFFSET_HOLE):
            raise ProtocolError(f"chunk of unknown type {kind}")
        if command != CMD_READ:
            raise ProtocolError(f"chunk of type {kind} for command {command}")
        (offset,) = _OFFSET.unpack_from(body)
        if kind == REPLY_TYPE_OFFSET_DATA:
            data, length = body[8:], 0
            size = len(data)
        else:
            data, length = b"", int.from_bytes(body[8:], "big")
            size = length
            if len(body) != 12:
                raise ProtocolError(f"hole chunk of {len(body)} bytes")
        if not size or offset < start or offset + size > start + count:
            raise ProtocolError(f"chunk for {size} bytes at {offset}, outside of the request")
        return Reply(cookie, done, kind, offset=offset, data=data, length=length)

    def _status(self, cookie: int, done: bool, kind: int, body: bytes, command: int) -> Reply:
        head, pair = (8, _EXTENDED_STATUS) if self._extended else (4, _STATUS)
        rest = body[head:]
        fits = len(body) > head and not len(rest) % pair.size
        if self._extended and fits:
            fits = int.from_bytes(body[4:8], "big") == len(rest) // pair.size
        if command != CMD_BLOCK_STATUS or not fits:
            raise ProtocolError(f"block status chunk of {len(body)} bytes")
        pairs = tuple(pair.iter_unpack(rest))
        if not all(found[0] for found in pairs):
            raise ProtocolError("block status with an extent of no bytes")
        return Reply(cookie, done, kind, context=int.from_bytes(body[:4], "big"), extents=pairs)
