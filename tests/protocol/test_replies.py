"""Replies: what both sides do, against bytes that are packed here by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pynbdkit.protocol.errors import ProtocolError
from pynbdkit.protocol.replies import (
    MAX_CHUNK,
    Reply,
    ReplyParser,
    encode_data,
    encode_error,
    encode_hole,
    encode_none,
    encode_simple,
    encode_status,
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
SIMPLE, STRUCTURED, EXTENDED = 0x67446698, 0x668E33EF, 0x6E8A278C
NONE, DATA, HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002
EIO = 5


def chunk(kind: int, cookie: int, body: bytes, flags: int = 1, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return struct.pack(">IHHQI", STRUCTURED, flags, kind, cookie, size) + body


def extended(
    kind: int, cookie: int, at: int, body: bytes, flags: int = 1, length: int | None = None
) -> bytes:
    size = len(body) if length is None else length
    return struct.pack(">IHHQQQ", EXTENDED, flags, kind, cookie, at, size) + body


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", SIMPLE, error, cookie) + data


def split(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    at = 0
    for end in (*sorted(cut % (len(data) + 1) for cut in cuts), len(data)):
        yield data[at:end]
        at = end


# -- the server's encoders, byte for byte ----------------------------------------------------------


def test_encoded_bytes() -> None:
    assert encode_simple(7) == simple(7)
    assert encode_simple(2**64 - 1, 28) == simple(2**64 - 1, 28)
    assert encode_none(7) == chunk(NONE, 7, b"")
    assert encode_data(7, 2**63, 5) + b"hello" == chunk(DATA, 7, b"\x80" + bytes(7) + b"hello")
    assert encode_data(7, 1, 5, done=False) == chunk(DATA, 7, bytes(7) + b"\1", 0, 13)
    assert encode_hole(7, 512, 4096) == chunk(HOLE, 7, struct.pack(">QI", 512, 4096))
    assert encode_hole(7, 512, 4096, False) == chunk(HOLE, 7, struct.pack(">QI", 512, 4096), 0)
    assert encode_error(7, 28, "full") == chunk(ERROR, 7, b"\0\0\0\x1c\0\4full")
    assert encode_error(7, 5, "", 99) == chunk(ERROR_OFFSET, 7, b"\0\0\0\5\0\0" + bytes(7) + b"c")
    assert encode_status(7, 3, [(4096, 0), (2**32 - 1, 3)]) == chunk(
        BLOCK_STATUS, 7, struct.pack(">IIIII", 3, 4096, 0, 2**32 - 1, 3)
    )


def test_encoded_bytes_with_extended_headers() -> None:
    assert encode_none(7, at=9) == extended(NONE, 7, 9, b"")
    assert encode_none(7, at=0) == extended(NONE, 7, 0, b"")
    assert encode_data(7, 2**63, 5, at=2**63) + b"hello" == extended(
        DATA, 7, 2**63, b"\x80" + bytes(7) + b"hello"
    )
    assert encode_hole(7, 512, 4096, False, at=0) == extended(
        HOLE, 7, 0, struct.pack(">QI", 512, 4096), 0
    )
    assert encode_error(7, 28, "full", at=3) == extended(ERROR, 7, 3, b"\0\0\0\x1c\0\4full")
    assert encode_error(7, 5, "", 99, at=98) == extended(
        ERROR_OFFSET, 7, 98, b"\0\0\0\5\0\0" + bytes(7) + b"c"
    )
    assert encode_status(7, 3, [(4096, 0), (2**64 - 1, 2**63)], at=0) == extended(
        BLOCK_STATUS_EXT, 7, 0, struct.pack(">IIQQQQ", 3, 2, 4096, 0, 2**64 - 1, 2**63)
    )


@pytest.mark.parametrize("pair", [(2**32, 0), (1, 2**32)])
def test_a_status_of_64_bits_needs_extended_headers(pair: tuple[int, int]) -> None:
    with pytest.raises(OverflowError):
        encode_status(7, 3, [pair])
    assert encode_status(7, 3, [pair], at=0).endswith(struct.pack(">QQ", *pair))


@example("x" * 4095 + "\u00e9")
@example("\U0001f600" * 2000)
@given(st.text(st.characters(codec=None, categories=None), max_size=300))
def test_a_message_is_whole_utf8_of_a_bounded_length(text: str) -> None:
    """Whatever an exception says: surrogates, or a cut in the middle of a character."""
    body = encode_error(1, EIO, text)[20:]
    error, length = struct.unpack(">IH", body[:6])
    assert (error, length) == (EIO, len(body) - 6)
    assert length <= 4096
    shown = body[6:].decode()
    honest = text.encode("utf-8", "replace").decode()
    assert honest.startswith(shown)
    assert shown == honest or length > 4096 - 4


# -- the client's parser: what an honest server sends ----------------------------------------------

cookies = st.integers(0, 2**64 - 1)


@st.composite
def conversations(
    draw: st.DrawFn, structured: bool
) -> tuple[list[tuple[int, int, int, int]], bytes, list[Reply]]:
    """Requests (cookie, kind, offset, count), a server's answer in bytes, and what it means."""
    requests = []
    streams: list[list[tuple[bytes, Reply]]] = []
    for cookie in draw(st.lists(cookies, unique=True, max_size=6)):
        kind = draw(st.sampled_from((READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS)))
        offset = draw(st.integers(0, 2**63))
        count = draw(st.integers(1, 300))
        requests.append((cookie, kind, offset, count))
        error = draw(st.sampled_from((0, 0, 0, 1, 5, 12, 22, 28, 75, 95, 108, 9999)))
        streams.append(draw(answers(structured, cookie, kind, offset, count, error)))
    wire, meaning = b"", []
    while any(streams):  # chunks of different replies may be mixed
        stream = draw(st.sampled_from([stream for stream in streams if stream]))
        data, reply = stream.pop(0)
        wire += data
        meaning.append(reply)
    return requests, wire, meaning


@st.composite
def answers(
    draw: st.DrawFn, structured: bool, cookie: int, kind: int, offset: int, count: int, error: int
) -> list[tuple[bytes, Reply]]:
    if not structured or kind not in (READ, STATUS):
        if structured and draw(st.booleans()):
            if not error:
                return [(encode_none(cookie), Reply(cookie, True, NONE))]
            text = draw(st.text(max_size=20))
            return [(encode_error(cookie, error, text), Reply(cookie, True, ERROR, error, text))]
        data = (
            draw(st.binary(min_size=count, max_size=count)) if kind == READ and not error else b""
        )
        reply = Reply(cookie, True, None, error, offset=offset, data=data)
        return [(encode_simple(cookie, error) + data, reply)]
    result: list[tuple[bytes, Reply]] = []
    if kind == STATUS and not error:
        pairs = draw(
            st.lists(
                st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 3)), min_size=1, max_size=9
            )
        )
        reply = Reply(cookie, True, BLOCK_STATUS, context=3, extents=tuple(pairs))
        return [(encode_status(cookie, 3, pairs), reply)]
    at = offset
    while kind == READ and at < offset + count:
        size = draw(st.integers(1, offset + count - at))
        done = not error and at + size == offset + count and draw(st.booleans())
        if draw(st.booleans()):
            data = draw(st.binary(min_size=size, max_size=size))
            reply = Reply(cookie, done, DATA, offset=at, data=data)
            result.append((encode_data(cookie, at, size, done) + data, reply))
        else:
            reply = Reply(cookie, done, HOLE, offset=at, length=size)
            result.append((encode_hole(cookie, at, size, done), reply))
        at += size
        if error and draw(st.booleans()):
            break
    if error:
        text = draw(st.text(max_size=20))
        where = draw(st.integers(offset, offset + count - 1) | st.none())
        number = ERROR if where is None else ERROR_OFFSET
        reply = Reply(cookie, True, number, error, text, where or 0)
        result.append((encode_error(cookie, error, text, where), reply))
    elif not result[-1][1].done:
        result.append((encode_none(cookie), Reply(cookie, True, NONE)))
    return result


@pytest.mark.parametrize("structured", [False, True])
@given(st.data(), st.lists(st.integers(0, 3000), max_size=20))
def test_any_split_gives_the_same_replies(
    structured: bool, data: st.DataObject, cuts: list[int]
) -> None:
    """And what the server encodes, the client decodes."""
    requests, wire, meaning = data.draw(conversations(structured))
    parser = ReplyParser(structured)
    for cookie, kind, offset, count in requests:
        parser.expect(cookie, kind, offset, count)
    assert parser.waiting == len(requests)
    result = []
    for piece in split(wire, cuts):
        result += parser.receive(piece)
        assert parser.waiting == len(requests) - sum(reply.done for reply in result)
    assert result == meaning
    assert parser.waiting == 0


def test_a_cookie_may_be_used_again_when_its_reply_is_complete() -> None:
    parser = ReplyParser(True)
    for count in (3, 5):
        parser.expect(1, READ, 0, count)
        (reply,) = parser.receive(encode_data(1, 0, count) + bytes(count))
        assert reply.done
        assert len(reply.data) == count


def test_an_error_of_a_kind_to_come_is_an_error() -> None:
    """NBD protocol, "Structured reply types": unknown error chunks are errors all the same."""
    parser = ReplyParser(True)
    parser.expect(1, WRITE, 0, 512)
    body = struct.pack(">IH", 28, 4) + b"full" + b"whatever it adds"
    (reply,) = parser.receive(chunk(0x8077, 1, body))
    assert (reply.error, reply.message, reply.done) == (28, "full", True)


def test_a_message_that_is_no_utf8_is_shown_as_well_as_can_be() -> None:
    parser = ReplyParser(True)
    parser.expect(1, WRITE, 0, 512)
    (reply,) = parser.receive(chunk(ERROR, 1, struct.pack(">IH", 5, 3) + b"a\xffb"))
    assert reply.message == "a\ufffdb"


# -- what no honest server sends -------------------------------------------------------------------

EXPECTED = {1: (READ, 1000, 100), 2: (WRITE, 0, 512), 3: (STATUS, 0, 4096), 4: (FLUSH, 0, 0)}

LIES = {
    "magic": b"\0\0\0\1" + bytes(16),
    "request magic": struct.pack(">IIQ", 0x25609513, 0, 2),
    "cookie of a simple reply": simple(9),
    "cookie of a chunk": chunk(NONE, 9, b""),
    "simple reply to a read": simple(1, 0, bytes(100)),
    "simple error to a read": simple(1, EIO),
    "simple success to block status": simple(3),
    "chunk over the limit": chunk(DATA, 1, b"", length=MAX_CHUNK + 1),
    "chunk of 4 GiB": chunk(ERROR, 2, b"", length=2**32 - 1),
    "none with data": chunk(NONE, 2, b"x"),
    "none that is not the last": chunk(NONE, 2, b"", 0),
    "unknown chunk": chunk(3, 2, b""),
    "extended block status": chunk(6, 3, bytes(24)),
    "data for a write": chunk(DATA, 2, bytes(8) + b"x"),
    "hole for a write": chunk(HOLE, 2, struct.pack(">QI", 0, 512)),
    "hole for block status": chunk(HOLE, 3, struct.pack(">QI", 0, 512)),
    "data of nothing": chunk(DATA, 1, struct.pack(">Q", 1000)),
    "data without offset": chunk(DATA, 1, bytes(7)),
    "data before the range": chunk(DATA, 1, struct.pack(">Q", 999) + b"x"),
    "data that ends after the range": chunk(DATA, 1, struct.pack(">Q", 1099) + b"xy"),
    "data after the range": chunk(DATA, 1, struct.pack(">Q", 1100) + b"x"),
    "data at an absurd offset": chunk(DATA, 1, struct.pack(">Q", 2**64 - 1) + b"x"),
    "hole of nothing": chunk(HOLE, 1, struct.pack(">QI", 1000, 0)),
    "hole beyond the range": chunk(HOLE, 1, struct.pack(">QI", 1000, 101)),
    "hole before the range": chunk(HOLE, 1, struct.pack(">QI", 0, 10)),
    "short hole": chunk(HOLE, 1, struct.pack(">QH", 1000, 10)),
    "long hole": chunk(HOLE, 1, struct.pack(">QIB", 1000, 10, 0)),
    "error 0": chunk(ERROR, 2, struct.pack(">IH", 0, 0)),
    "short error": chunk(ERROR, 2, bytes(5)),
    "error message that is too long": chunk(ERROR, 2, struct.pack(">IH", 5, 4) + b"abc"),
    "error with more than its message": chunk(ERROR, 2, struct.pack(">IH", 5, 2) + b"abc"),
    "error offset is missing": chunk(ERROR_OFFSET, 1, struct.pack(">IH", 5, 2) + b"ab"),
    "error offset is short": chunk(ERROR_OFFSET, 1, struct.pack(">IH", 5, 0) + bytes(7)),
    "error offset is long": chunk(ERROR_OFFSET, 1, struct.pack(">IHQB", 5, 0, 1000, 0)),
    "error before the range": chunk(ERROR_OFFSET, 1, struct.pack(">IHQ", 5, 0, 999)),
    "error after the range": chunk(ERROR_OFFSET, 1, struct.pack(">IHQ", 5, 0, 1100)),
    "error somewhere in a flush": chunk(ERROR_OFFSET, 4, struct.pack(">IHQ", 5, 0, 0)),
    "unknown error, short": chunk(0x8077, 2, bytes(5)),
    "unknown error, error 0": chunk(0x8077, 2, bytes(6)),
    "status for a read": chunk(BLOCK_STATUS, 1, struct.pack(">III", 1, 512, 0)),
    "status without extents": chunk(BLOCK_STATUS, 3, struct.pack(">I", 1)),
    "status without context": chunk(BLOCK_STATUS, 3, b""),
    "status with half an extent": chunk(BLOCK_STATUS, 3, struct.pack(">IIII", 1, 512, 0, 512)),
    "status with an extent of nothing": chunk(BLOCK_STATUS, 3, struct.pack(">III", 1, 0, 0)),
}  # fmt: skip


def lied_to() -> ReplyParser:
    parser = ReplyParser(True)
    for cookie, request in EXPECTED.items():
        parser.expect(cookie, *request)
    return parser


@pytest.mark.parametrize("lie", list(LIES))
def test_every_lie_is_refused(lie: str) -> None:
    with pytest.raises(ProtocolError):
        lied_to().receive(LIES[lie])
    parser = lied_to()
    at = 0
    with pytest.raises(ProtocolError):  # a byte at a time
        for at in range(len(LIES[lie])):
            assert parser.receive(LIES[lie][at : at + 1]) == []
    if "chunk " in lie:
        assert at < 20  # nothing of a chunk that cannot be is waited for


@given(st.sampled_from(sorted(LIES)), st.lists(st.integers(0, 300), max_size=8))
def test_what_came_before_a_lie_is_never_more_than_the_truth(lie: str, cuts: list[int]) -> None:
    parser = lied_to()
    parser.expect(5, READ, 0, 4)
    honest = encode_data(5, 0, 4, done=False) + b"abcd" + encode_none(5)
    truth = [Reply(5, False, DATA, offset=0, data=b"abcd"), Reply(5, True, NONE)]
    result: list[Reply] = []
    with pytest.raises(ProtocolError):
        for piece in split(honest + LIES[lie], cuts):
            result += parser.receive(piece)
    assert result == truth[: len(result)]


@pytest.mark.parametrize(
    "answer", [chunk(NONE, 1, b""), chunk(DATA, 1, struct.pack(">Q", 1000) + bytes(100))]
)
def test_a_chunk_without_structured_replies_is_refused(answer: bytes) -> None:
    parser = ReplyParser(False)
    parser.expect(1, READ, 1000, 100)
    with pytest.raises(ProtocolError):
        parser.receive(answer)


def test_a_second_reply_to_a_request_is_refused() -> None:
    parser = ReplyParser(True)
    parser.expect(2, WRITE, 0, 512)
    assert parser.receive(simple(2))[0].done
    with pytest.raises(ProtocolError, match="not asked for"):
        parser.receive(simple(2))


@given(st.binary(max_size=200), st.booleans(), st.lists(st.integers(0, 200), max_size=5))
def test_noise_is_an_error_or_no_reply(data: bytes, structured: bool, cuts: list[int]) -> None:
    parser = ReplyParser(structured)
    for cookie, request in EXPECTED.items():
        parser.expect(cookie, *request)
    try:
        for piece in split(data, cuts):
            parser.receive(piece)
    except ProtocolError:
        pass


@given(
    st.sampled_from((NONE, DATA, HOLE, BLOCK_STATUS, ERROR, ERROR_OFFSET, 0x8003)),
    st.sampled_from(sorted(EXPECTED)),
    st.binary(max_size=120),
    st.integers(0, 3),
)
def test_noise_in_a_chunk_is_an_error_or_fits_the_request(
    kind: int, cookie: int, body: bytes, flags: int
) -> None:
    try:
        (reply,) = lied_to().receive(chunk(kind, cookie, body, flags))
    except ProtocolError:
        return
    command, offset, count = EXPECTED[cookie]
    if reply.data or reply.length:
        assert command == READ
        assert offset <= reply.offset
        assert reply.offset + len(reply.data) + reply.length <= offset + count
    elif reply.extents:
        assert command == STATUS
    else:
        assert reply.error or (kind == NONE and not body)


# -- extended headers ------------------------------------------------------------------------------


@given(st.data(), st.lists(st.integers(0, 3000), max_size=20))
def test_any_split_gives_the_same_replies_with_extended_headers(
    data: st.DataObject, cuts: list[int]
) -> None:
    requests, wire, meaning = [], b"", []
    for cookie in data.draw(st.lists(cookies, unique=True, max_size=6)):
        offset = data.draw(st.integers(0, 2**64 - 1001))
        kind = data.draw(st.sampled_from((READ, WRITE, ZEROES, STATUS)))
        count = data.draw(st.integers(1, 1000 if kind == READ else 2**64 - 1))
        error = data.draw(st.sampled_from((0, 0, 5, 22)))
        requests.append((cookie, kind, offset, count))
        if error:
            wire += encode_error(cookie, error, "why", at=offset)
            meaning.append(Reply(cookie, True, ERROR, error, "why"))
        elif kind == READ:
            body = data.draw(st.binary(min_size=count, max_size=count))
            wire += encode_data(cookie, offset, count, at=offset) + body
            meaning.append(Reply(cookie, True, DATA, offset=offset, data=body))
        elif kind == STATUS:
            pair = st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))
            pairs = data.draw(st.lists(pair, min_size=1, max_size=9))
            wire += encode_status(cookie, 3, pairs, at=offset)
            extents = tuple(pairs)
            meaning.append(Reply(cookie, True, BLOCK_STATUS_EXT, context=3, extents=extents))
        else:
            wire += encode_none(cookie, at=offset)
            meaning.append(Reply(cookie, True, NONE))
    parser = ReplyParser(True, extended=True)
    for request in requests:
        parser.expect(*request)
    result = []
    for piece in split(wire, cuts):
        result += parser.receive(piece)
    assert result == meaning
    assert parser.waiting == 0


@pytest.mark.parametrize(
    "lie",
    [
        simple(1),
        chunk(NONE, 1, b""),
        extended(NONE, 1, 4097, b""),
        extended(NONE, 2, 4096, b""),
        extended(BLOCK_STATUS, 1, 4096, struct.pack(">III", 3, 512, 0)),
        extended(BLOCK_STATUS_EXT, 1, 4096, struct.pack(">IIQQ", 3, 2, 512, 0)),
        extended(BLOCK_STATUS_EXT, 1, 4096, struct.pack(">IIQQ", 3, 1, 0, 0)),
        extended(BLOCK_STATUS_EXT, 1, 4096, struct.pack(">II", 3, 0)),
        extended(BLOCK_STATUS_EXT, 1, 4096, struct.pack(">IIQ", 3, 1, 512)),
        extended(BLOCK_STATUS_EXT, 1, 4096, b"\0\0\0"),
        extended(NONE, 1, 4096, b"", length=2**63),
    ],
)
def test_lies_with_extended_headers(lie: bytes) -> None:
    parser = ReplyParser(True, extended=True)
    parser.expect(1, STATUS, 4096, 1 << 40)
    with pytest.raises(ProtocolError):
        parser.receive(lie)


def test_an_extended_status_without_extended_headers_is_refused() -> None:
    parser = ReplyParser(True)
    parser.expect(1, STATUS, 0, 512)
    with pytest.raises(ProtocolError):
        parser.receive(chunk(BLOCK_STATUS_EXT, 1, struct.pack(">IIQQ", 3, 1, 512, 0)))
