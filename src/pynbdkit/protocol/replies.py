"""Replies of the transmission phase: the server's encoders, the client's parser.

A simple reply is a header (and a read's data). A structured reply is one or more chunks, the last
one marked DONE. Once structured replies were negotiated, a read is answered by chunks alone (NBD
protocol, "Structured replies"). The server's hot path packs `SIMPLE` and `DATA` itself.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError

from .constants import (
    CMD_BLOCK_STATUS,
    CMD_READ,
    MAX_PAYLOAD,
    MAX_STRING,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
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
HOLE: Final = Struct(">IHHQIQI")
"""CHUNK with OFFSET_HOLE's offset and length."""
_ERROR: Final = Struct(">IH")
_STATUS: Final = Struct(">II")
_OFFSET: Final = Struct(">Q")
MAX_CHUNK: Final = MAX_PAYLOAD + 8
"""The longest chunk that a client takes."""


def encode_simple(cookie: int, error: int = 0) -> bytes:
    """A simple reply; a read's data follows it."""
    return SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def encode_none(cookie: int) -> bytes:
    """The chunk that ends a structured reply and says nothing."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0)


def encode_data(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    """Header of an OFFSET_DATA chunk; `length` bytes of data follow it."""
    return DATA.pack(
        STRUCTURED_REPLY_MAGIC, int(done), REPLY_TYPE_OFFSET_DATA, cookie, length + 8, offset
    )


def encode_hole(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    """An OFFSET_HOLE chunk: `length` zeros."""
    return HOLE.pack(
        STRUCTURED_REPLY_MAGIC, int(done), REPLY_TYPE_OFFSET_HOLE, cookie, 12, offset, length
    )


def encode_error(cookie: int, error: int, message: str = "", offset: int | None = None) -> bytes:
    """An error chunk that ends the reply, with a message for people and, for reads, the offset."""
    text = message.encode("utf-8", "replace")[:MAX_STRING].decode("utf-8", "ignore").encode()
    body = _ERROR.pack(error, len(text)) + text
    kind = REPLY_TYPE_ERROR
    if offset is not None:
        kind = REPLY_TYPE_ERROR_OFFSET
        body += _OFFSET.pack(offset)
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, kind, cookie, len(body)) + body


def encode_status(
    cookie: int, context: int, extents: Iterable[tuple[int, int]], done: bool = True
) -> bytes:
    """A BLOCK_STATUS chunk: (length, status flags) pairs for one context."""
    body = context.to_bytes(4, "big") + b"".join(
        _STATUS.pack(length, flags) for length, flags in extents
    )
    return (
        CHUNK.pack(STRUCTURED_REPLY_MAGIC, int(done), REPLY_TYPE_BLOCK_STATUS, cookie, len(body))
        + body
    )


class Reply(NamedTuple):
    """One simple reply or one chunk, as a client understands it.

    `kind` is None for a simple reply, else REPLY_TYPE_*. `error` is 0 or the protocol's errno;
    `data` is what was read; `length` counts zeros (OFFSET_HOLE); `context` and `extents` belong to
    BLOCK_STATUS.
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

    def __init__(self, structured: bool) -> None:
        """`structured`: whether structured replies were negotiated."""
        self._structured = structured
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
        if magic == SIMPLE_REPLY_MAGIC:
            return self._simple(at)
        if magic == STRUCTURED_REPLY_MAGIC and self._structured:
            return self._chunk(at)
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

    def _chunk(self, at: int) -> tuple[Reply, int] | None:
        if len(self._buffer) - at < CHUNK.size:
            return None
        _, flags, kind, cookie, length = CHUNK.unpack_from(self._buffer, at)
        request = self._request_of(cookie)
        if length > MAX_CHUNK:
            raise ProtocolError(f"chunk of {length} bytes, more than {MAX_CHUNK}")
        at += CHUNK.size
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
        if kind == REPLY_TYPE_BLOCK_STATUS:
            if command != CMD_BLOCK_STATUS or len(body) < 12 or (len(body) - 4) % 8:
                raise ProtocolError(f"block status chunk of {len(body)} bytes")
            pairs = tuple(_STATUS.iter_unpack(body[4:]))
            if not all(pair[0] for pair in pairs):
                raise ProtocolError("block status with an extent of no bytes")
            return Reply(cookie, done, kind, context=int.from_bytes(body[:4], "big"), extents=pairs)
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
