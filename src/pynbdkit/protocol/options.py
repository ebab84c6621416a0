"""What options and their replies carry: values to bytes and back, for both sides of a handshake.

Each ``encode_x`` has its ``decode_x``, and ``decode_x(encode_x(v)) == v``. A decoder trusts no
length that it reads: whatever does not fit exactly is a `HandshakeError` with the code that the
specification gives to the case (the client turns it into a `ProtocolError`, as no server may
send such a thing). Strings are UTF-8 without NUL, at most 4096 bytes ("Conventions").
"""

from __future__ import annotations

from struct import Struct

from .constants import (
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_STRING,
    OPTION_REPLY_MAGIC,
    REP_ERR_INVALID,
    REP_ERR_TOO_BIG,
)
from .errors import HandshakeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import NamedTuple
else:
    from ._record import NamedTuple

OPTION_HEADER = Struct(">QII")  # magic, option, length
REPLY_HEADER = Struct(">QIII")  # magic, option, reply type, length

_U16 = Struct(">H")
_U32 = Struct(">I")
_INFO_EXPORT = Struct(">HQH")  # info type, size, transmission flags
_INFO_BLOCK_SIZE = Struct(">HIII")  # info type, minimum, preferred, maximum


class BlockSize(NamedTuple):
    """Block size constraints of an export, in bytes ("Block size constraints")."""

    minimum: int
    preferred: int
    maximum: int


class ExportQuery(NamedTuple):
    """The payload of OPT_INFO and OPT_GO: an export's name and the infos wanted about it."""

    name: str
    infos: tuple[int, ...]


class ContextQuery(NamedTuple):
    """The payload of OPT_LIST_META_CONTEXT and OPT_SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


# --- Strings ---------------------------------------------------------------------------------


def encode_string(text: str, what: str) -> bytes:
    """Return a string's bytes; raises ValueError, naming ``what``, if no peer may be sent it."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode: {shorten(text)}") from None
    if len(data) > MAX_STRING:
        raise ValueError(f"{what} is {len(data)} bytes long, the protocol allows {MAX_STRING}")
    if 0 in data:
        raise ValueError(f"{what} contains a NUL character: {shorten(text)}")
    return data


def decode_string(data: bytes, what: str) -> str:
    """Return the string in ``data``; raises HandshakeError, naming ``what``, if it is none."""
    if len(data) > MAX_STRING:
        message = f"{what} is {len(data)} bytes long, the protocol allows {MAX_STRING}"
        raise HandshakeError(REP_ERR_TOO_BIG, message)
    if 0 in data:
        raise HandshakeError(REP_ERR_INVALID, f"{what} contains a NUL character")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise HandshakeError(REP_ERR_INVALID, f"{what} is not valid UTF-8") from None


def encode_display(text: str) -> bytes:
    """Return the bytes of a text for people, made to fit: cut at 4096 bytes, nothing unsendable."""
    data = text.replace("\0", "?").encode(errors="replace")
    return data if len(data) <= MAX_STRING else data[:MAX_STRING].decode(errors="ignore").encode()


def decode_display(data: bytes) -> str:
    """Return a text for people in one line: no control characters reach the user's terminal."""
    text = data.decode(errors="replace")
    return "".join([char if char.isprintable() else " " for char in text])


def shorten(text: str, limit: int = 64) -> str:
    """Return ``text`` quoted and cut to ``limit`` characters, for a message of one line."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


# --- Frames ----------------------------------------------------------------------------------


def encode_option(option: int, data: bytes = b"") -> bytes:
    """Return an option as the client sends it."""
    return OPTION_HEADER.pack(IHAVEOPT, option, len(data)) + data


def encode_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Return the reply to an option as the server sends it."""
    return REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


# --- Payloads of options -----------------------------------------------------------------------


def encode_export_query(query: ExportQuery) -> bytes:
    """Return the payload of OPT_INFO and OPT_GO; raises ValueError for an impossible name."""
    name = encode_string(query.name, "export name")
    infos = b"".join([_U16.pack(info) for info in query.infos])
    return b"".join([_U32.pack(len(name)), name, _U16.pack(len(query.infos)), infos])


def decode_export_query(data: bytes) -> ExportQuery:
    """Return what OPT_INFO or OPT_GO asks for; raises HandshakeError."""
    reader = _Reader(data)
    name = reader.string("export name")
    infos = [reader.u16() for _ in range(reader.u16())]
    reader.end()
    return ExportQuery(name, tuple(infos))


def encode_context_query(query: ContextQuery) -> bytes:
    """Return the payload of OPT_LIST_ and OPT_SET_META_CONTEXT; raises ValueError."""
    parts = [_counted(query.name, "export name"), _U32.pack(len(query.queries))]
    parts += [_counted(text, "metadata context") for text in query.queries]
    return b"".join(parts)


def decode_context_query(data: bytes) -> ContextQuery:
    """Return what OPT_LIST_ or OPT_SET_META_CONTEXT asks for; raises HandshakeError."""
    reader = _Reader(data)
    name = reader.string("export name")
    queries = []
    for _ in range(reader.u32()):  # A lying count meets the end of the data long before it ends.
        query = reader.string("metadata context query")
        namespace, colon, _leaf = query.partition(":")
        if not namespace or not colon:
            message = f"metadata context query {shorten(query)} has no namespace and colon"
            raise HandshakeError(REP_ERR_INVALID, message)
        queries.append(query)
    reader.end()
    return ContextQuery(name, tuple(queries))


# --- Payloads of replies -----------------------------------------------------------------------


def encode_server(name: str, description: str) -> bytes:
    """Return the payload of REP_SERVER; raises ValueError for an impossible name."""
    return _counted(name, "export name") + encode_display(description)


def decode_server(data: bytes) -> tuple[str, str]:
    """Return name and description out of REP_SERVER; raises HandshakeError."""
    reader = _Reader(data)
    name = reader.string("export name")
    return name, decode_display(reader.rest())


def encode_info_export(size: int, flags: int) -> bytes:
    """Return the payload of REP_INFO for INFO_EXPORT: size in bytes and transmission flags."""
    return _INFO_EXPORT.pack(INFO_EXPORT, size, flags)


def encode_info_string(info: int, data: bytes) -> bytes:
    """Return the payload of REP_INFO for INFO_NAME and INFO_DESCRIPTION."""
    return _U16.pack(info) + data


def encode_info_block_size(block_size: BlockSize) -> bytes:
    """Return the payload of REP_INFO for INFO_BLOCK_SIZE."""
    return _INFO_BLOCK_SIZE.pack(INFO_BLOCK_SIZE, *block_size)


def decode_info(data: bytes) -> tuple[int, bytes]:
    """Return info type and payload out of REP_INFO; raises HandshakeError."""
    reader = _Reader(data)
    return reader.u16(), reader.rest()


def decode_info_export(payload: bytes) -> tuple[int, int]:
    """Return size in bytes and transmission flags; raises HandshakeError."""
    if len(payload) != _INFO_EXPORT.size - 2:
        raise _bad_length("export info")
    return int.from_bytes(payload[:8], "big"), int.from_bytes(payload[8:], "big")


def decode_info_block_size(payload: bytes) -> BlockSize:
    """Return the constraints; raises HandshakeError for such as no server may ask for."""
    if len(payload) != _INFO_BLOCK_SIZE.size - 2:
        raise _bad_length("block size info")
    minimum, preferred, maximum = (int.from_bytes(payload[i : i + 4], "big") for i in (0, 4, 8))
    fits = _is_power_of_2(minimum) and _is_power_of_2(preferred)
    if not fits or minimum > 65536 or preferred < minimum or maximum < minimum:
        message = f"block sizes {minimum}, {preferred}, {maximum} contradict the specification"
        raise HandshakeError(REP_ERR_INVALID, message)
    return BlockSize(minimum, preferred, maximum)


def encode_context(context_id: int, name: str) -> bytes:
    """Return the payload of REP_META_CONTEXT."""
    return _U32.pack(context_id) + encode_string(name, "metadata context")


def decode_context(data: bytes) -> tuple[int, str]:
    """Return ID and name out of REP_META_CONTEXT; raises HandshakeError."""
    reader = _Reader(data)
    return reader.u32(), decode_string(reader.rest(), "metadata context")


def match_contexts(
    available: Sequence[str], queries: Iterable[str], *, wildcards: bool
) -> list[str]:
    """Return those of ``available`` that a query names, each once, in the order of ``available``.

    With ``wildcards`` (OPT_LIST_META_CONTEXT) an empty leaf-name, as in ``base:``, means all of
    its namespace; without (OPT_SET_META_CONTEXT) it selects nothing ("Metadata querying"). What
    is not known is not an error.
    """
    wanted = set(queries)
    return [
        name
        for name in available
        if name in wanted or (wildcards and name.partition(":")[0] + ":" in wanted)
    ]


# --- Helpers -----------------------------------------------------------------------------------


def _counted(text: str, what: str) -> bytes:
    data = encode_string(text, what)
    return _U32.pack(len(data)) + data


def _is_power_of_2(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def _bad_length(what: str) -> HandshakeError:
    return HandshakeError(REP_ERR_INVALID, f"the lengths inside the {what} do not add up")


class _Reader:
    """Takes a payload apart from left to right; every step past its end is a HandshakeError."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise _bad_length("data")
        data = self._data[self._position : end]
        self._position = end
        return data

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self, what: str) -> str:
        return decode_string(self.take(self.u32()), what)

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._position)

    def end(self) -> None:
        if self._position != len(self._data):
            raise _bad_length("data")
