"""Options of the handshake packed by hand, and their replies taken apart.

Nothing of the package encodes or decodes here: a mistake that both of its sides share is still
seen.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    range(1, 12)
)
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG = (
    2**31 + number for number in range(1, 10)
)
EXT_HEADER_REQD = 2**31 + 10
SEND_DF = 1 << 7
STATUS_PAYLOAD = 1 << 12


class Reply(NamedTuple):
    """A reply to an option."""

    option: int
    kind: int
    data: bytes


def flags(value: int = 3) -> bytes:
    """Client flags."""
    return struct.pack(">I", value)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; `length` is what its header says, where it lies."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def counted(data: bytes) -> bytes:
    """A string behind its length."""
    return struct.pack(">I", len(data)) + data


def go(name: bytes, *infos: int) -> bytes:
    """The data of INFO and GO."""
    return counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(name: bytes, *queries: bytes) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return counted(name) + struct.pack(">I", len(queries)) + b"".join(map(counted, queries))


def split(data: bytes) -> list[Reply]:
    """The replies in `data`, which must be whole."""
    replies = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        replies.append(Reply(number, kind, data[20 : 20 + length]))
        assert len(replies[-1].data) == length
        data = data[20 + length :]
    return replies


def kinds(replies: list[Reply]) -> list[int]:
    """What the replies are."""
    return [reply.kind for reply in replies]


class Machine(Protocol):
    """The server's side of a handshake."""

    def receive(self, data: bytes, /) -> bytes: ...


def drain(server: Machine, data: bytes) -> bytes:
    """Feed `data` and gather answers as a driver does."""
    output = answer = server.receive(data)
    while answer:
        answer = server.receive(b"")
        output += answer
    return output


def talk(server: Machine, *options: bytes, client_flags: int = 3) -> list[Reply]:
    """The replies to flags and options that are sent in one piece."""
    return split(drain(server, flags(client_flags) + b"".join(options)))
