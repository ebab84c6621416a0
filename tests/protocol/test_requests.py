"""The server's request parser, fed with bytes that are packed here by hand."""

from __future__ import annotations

import ctypes
import mmap
import resource
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.protocol.constants import MAX_PAYLOAD
from pynbdkit.protocol.requests import (
    ALIGNMENT,
    FIRST_BUFFER,
    LARGE_BUFFER,
    MANY_REQUESTS,
    MAPPED_BUFFER,
    ONCE_MORE,
    SMALL_BUFFER,
    RequestParser,
    encode_request,
)

READ, WRITE, DISC, FLUSH = range(4)
PAYLOAD_LEN = 1 << 5
MAGIC = 0x25609513
KIB, MIB = 1 << 10, 1 << 20
LIMIT = 200
"""max_payload of the parsers below: so a payload over the limit is a small one."""

Parsed = tuple[int, int, int, int, int, bytes | None]


class Sent(NamedTuple):
    """A request as a client means it."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""

    def wire(self) -> bytes:
        header = (MAGIC, self.flags, self.kind, self.cookie, self.offset, self.length)
        return struct.pack(">IHHQQI", *header) + self.payload

    def parsed(self, limit: int = LIMIT) -> Parsed:
        """What the parser must make of it."""
        payload = self.payload if self.kind == WRITE and 0 < self.length <= limit else None
        return (*self[:5], payload)


class SentExtended(Sent):
    """The same with an extended header: a flag says whether a payload follows."""

    __slots__ = ()

    def wire(self) -> bytes:
        header = (0x21E41C71, self.flags, self.kind, self.cookie, self.offset, self.length)
        return struct.pack(">IHHQQQ", *header) + self.payload

    def parsed(self, limit: int = LIMIT) -> Parsed:
        """What the parser must make of it: a write with a payload loses the flag, if it had it."""
        if not self.length or not (self.kind == WRITE or self.flags & PAYLOAD_LEN):
            return (*self[:5], None)
        flags = self.flags & ~PAYLOAD_LEN if self.kind == WRITE else self.flags
        return (flags, *self[1:5], self.payload if self.length <= limit else None)


def write(data: bytes, cookie: int = 1, offset: int = 0) -> Sent:
    return Sent(0, WRITE, cookie, offset, len(data), data)


_PATTERN = bytes(range(251))


def noise(count: int, seed: int = 0) -> bytes:
    """Bytes none of which looks like its neighbour."""
    first = seed % 251
    return (_PATTERN * (count // 251 + 2))[first : first + count]


u16 = st.integers(0, 2**16 - 1)
u64 = st.integers(0, 2**64 - 1)
others = st.builds(
    Sent,
    u16,
    u16.filter(lambda kind: kind != WRITE),
    u64,
    u64,
    st.integers(0, 2**32 - 1),
    st.just(b""),
)
writes = st.builds(
    lambda flags, cookie, offset, count: Sent(
        flags, WRITE, cookie, offset, count, noise(count, cookie & 0xFF)
    ),
    u16,
    u64,
    u64,
    st.integers(0, LIMIT) | st.sampled_from((0, 1, LIMIT, LIMIT + 1, 3 * LIMIT, 5000)),
)
requests = st.lists(others | writes, max_size=12)
without_payload = st.builds(
    SentExtended,
    u16.map(lambda flags: flags & ~PAYLOAD_LEN),
    u16.filter(lambda kind: kind != WRITE),
    u64,
    u64,
    u64,
    st.just(b""),
)
with_payload = st.builds(
    lambda flags, kind, cookie, offset, count: SentExtended(
        # Not every client sets the flag on a write, though it must.
        flags if kind == WRITE else flags | PAYLOAD_LEN,
        kind,
        cookie,
        offset,
        count,
        noise(count, cookie & 0xFF),
    ),
    u16,
    st.just(WRITE) | u16,
    u64,
    u64,
    st.integers(0, LIMIT) | st.sampled_from((0, 1, LIMIT, LIMIT + 1, 3 * LIMIT, 5000)),
)
extended_requests = st.lists(without_payload | with_payload, max_size=12)
cuts = st.lists(st.integers(0, 4000), max_size=30)


def split(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """Cut `data` at some places; one after another gives all of it."""
    at = 0
    for end in (*sorted(cut % (len(data) + 1) for cut in cuts), len(data)):
        yield data[at:end]
        at = end


def put(parser: RequestParser, data: bytes) -> None:
    """Receive `data`, which fits."""
    space = parser.space()
    space[: len(data)] = data
    parser.received(len(data))


def batches(parser: RequestParser, data: bytes) -> Iterator[list[Any]]:
    """Receive `data` as a socket would, as much at a time as fits: the requests of each time."""
    rest = memoryview(data)
    while rest:
        space = parser.space()
        assert len(space) > 0  # a socket that is asked for nothing says that it is at its end
        count = min(len(space), len(rest))
        space[:count] = rest[:count]
        parser.received(count)
        rest = rest[count:]
        yield parser.requests()


def copies(batch: list[Any]) -> list[Parsed]:
    """Requests whose payloads stay what they are."""
    return [(*r[:5], None if r[5] is None else bytes(r[5])) for r in batch]


def feed(parser: RequestParser, pieces: Iterator[bytes] | Sequence[bytes]) -> list[Parsed]:
    """Receive pieces, and keep a copy of every request at once."""
    return [copy for piece in pieces for batch in batches(parser, piece) for copy in copies(batch)]


def size_of(parser: RequestParser) -> int:
    """The bytes that the parser's buffer has, but for the few that align payloads."""
    size = len(parser.space().obj)  # type: ignore[arg-type]
    return size - size % ALIGNMENT


# -- what is parsed --------------------------------------------------------------------------------


@given(requests, cuts)
def test_any_split_gives_the_same_requests(sent: list[Sent], cuts: list[int]) -> None:
    data = b"".join(request.wire() for request in sent)
    parser = RequestParser(max_payload=LIMIT)
    assert feed(parser, split(data, cuts)) == [request.parsed() for request in sent]
    assert not parser.partial
    assert parser.broken == ""


@given(extended_requests, cuts)
def test_any_split_gives_the_same_requests_with_extended_headers(
    sent: list[SentExtended], cuts: list[int]
) -> None:
    data = b"".join(request.wire() for request in sent)
    parser = RequestParser(max_payload=LIMIT, extended=True)
    assert feed(parser, split(data, cuts)) == [request.parsed() for request in sent]
    assert not parser.partial
    assert parser.broken == ""


@given(u16.map(lambda flags: flags & ~PAYLOAD_LEN), u16, u64, u64, u64)
def test_what_the_client_encodes_with_extended_headers(
    flags: int, kind: int, cookie: int, offset: int, count: int
) -> None:
    """Lengths have 64 bits, and a write says that it has a payload."""
    encoded = encode_request(kind, cookie, offset, count, flags, extended=True)
    wanted = flags | PAYLOAD_LEN if kind == WRITE else flags
    assert encoded == SentExtended(wanted, kind, cookie, offset, count).wire()


@pytest.mark.parametrize("extended", [False, True])
def test_each_form_of_header_is_the_others_wrong_magic(extended: bool) -> None:
    parser = RequestParser(extended=extended)
    assert feed(parser, [encode_request(READ, 1, 0, 512, extended=not extended) + bytes(8)]) == []
    assert "magic" in parser.broken


def test_missing_counts_the_longer_header() -> None:
    parser = RequestParser(extended=True)
    put(parser, encode_request(READ, 1, 0, 512, extended=True)[:30])
    assert parser.requests() == []
    assert parser.missing == 2


@given(requests, st.integers(0, 4000), cuts)
def test_what_came_with_the_handshake_counts(sent: list[Sent], early: int, cuts: list[int]) -> None:
    data = b"".join(request.wire() for request in sent)
    early %= len(data) + 1
    parser = RequestParser(data[:early], max_payload=LIMIT)
    first = [(*r[:5], None if r[5] is None else bytes(r[5])) for r in parser.requests()]
    assert first + feed(parser, split(data[early:], cuts)) == [r.parsed() for r in sent]


def test_more_than_a_buffer_may_come_with_the_handshake() -> None:
    sent = [write(noise(1000, number), number) for number in range(100)]
    data = b"".join(request.wire() for request in sent)
    parser = RequestParser(data[:-1])
    first = [(*r[:5], bytes(r[5] or b"")) for r in parser.requests()]
    assert first + feed(parser, [data[-1:]]) == [r.parsed(MAX_PAYLOAD) for r in sent]


@given(u16, u16.filter(lambda kind: kind != WRITE), u64, u64, st.integers(0, 2**32 - 1))
def test_what_the_client_encodes_the_server_decodes(
    flags: int, kind: int, cookie: int, offset: int, count: int
) -> None:
    sent = Sent(flags, kind, cookie, offset, count)
    encoded = encode_request(kind, cookie, offset, count, flags)
    assert encoded == sent.wire()
    assert feed(RequestParser(), [encoded]) == [sent.parsed()]


@given(requests, requests, st.integers(0, 2**32 - 1).filter(lambda magic: magic != MAGIC), cuts)
def test_after_a_wrong_magic_nothing_is_understood(
    good: list[Sent], more: list[Sent], magic: int, cuts: list[int]
) -> None:
    bad = magic.to_bytes(4, "big") + bytes(24)
    data = b"".join([*(r.wire() for r in good), bad, *(r.wire() for r in more)])
    parser = RequestParser(max_payload=LIMIT)
    result: list[Parsed] = []
    for piece in split(data, cuts):
        if parser.broken:
            break  # nobody would receive any more
        result += feed(parser, [piece])
    assert result == [request.parsed() for request in good]
    assert f"{magic:#x}" in parser.broken
    assert parser.requests() == []


@given(requests.filter(len), cuts, st.data())
def test_partial_says_whether_a_request_has_begun(
    sent: list[Sent], cuts: list[int], data: st.DataObject
) -> None:
    whole = b"".join(request.wire() for request in sent)
    ends, at = {0}, 0
    for request in sent:
        at += len(request.wire())
        ends.add(at)
    upto = data.draw(st.integers(0, len(whole)) | st.sampled_from(sorted(ends)))
    parser = RequestParser(max_payload=LIMIT)
    feed(parser, split(whole[:upto], cuts))
    assert parser.partial == (upto not in ends)


# -- payloads --------------------------------------------------------------------------------------


def test_a_payload_is_a_view_of_the_buffer() -> None:
    """No copy: what the socket wrote is what the plugin gets."""
    parser = RequestParser()
    request = write(noise(500))
    space = parser.space()
    put(parser, request.wire())
    payload = parser.requests()[0][5]
    assert payload is not None
    assert payload.obj is space.obj


@given(requests, requests, requests, cuts)
def test_payloads_live_until_it_turns_over_again(
    first: list[Sent], second: list[Sent], third: list[Sent], cuts: list[int]
) -> None:
    parser = RequestParser(max_payload=LIMIT)
    before: list[Any] = []
    expected: list[Parsed] = []
    for sent in (first, second, third, first):
        data = b"".join(request.wire() for request in sent)
        batch: list[Any] = []
        for piece in split(data, cuts):
            for received in batches(parser, piece):
                batch = received
        assert not parser.partial
        assert copies(before) == expected
        parser.turn_over()
        before = batch
        expected = copies(batch)


@pytest.mark.parametrize("extended", [False, True])
def test_a_large_payload_is_where_memory_is_copied_fastest(extended: bool) -> None:
    parser = RequestParser(extended=extended)
    kind = SentExtended if extended else Sent
    whole = kind(0, WRITE, 1, 0, 200 * KIB, noise(200 * KIB)).wire()
    for _ in range(6):
        (request,) = [request for batch in batches(parser, whole) for request in batch]
        address = ctypes.addressof(ctypes.c_char.from_buffer(request[5]))
        assert address % ALIGNMENT == 0
        parser.turn_over()


@pytest.mark.parametrize("size", [SMALL_BUFFER, LARGE_BUFFER])
def test_where_there_is_no_memory_for_a_second_buffer(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = RequestParser()
    whole = write(noise(size - 28)).wire()
    feed(parser, [whole])
    space = parser.space()

    def none(*_: object) -> object:
        raise MemoryError if size < MAPPED_BUFFER else OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", none)
        patch.setattr("pynbdkit.protocol.requests.bytearray", none, raising=False)
        with pytest.raises(MemoryError):
            parser.turn_over()
    assert parser.space().obj is space.obj
    assert feed(parser, [whole]) == [write(noise(size - 28)).parsed(size)]


@given(requests, requests, cuts, cuts)
def test_payloads_live_on_after_detach(
    before: list[Sent], after: list[Sent], cuts: list[int], more: list[int]
) -> None:
    """Whatever comes later, and wherever in a request detach comes."""
    data = b"".join(request.wire() for request in (*before, *after))
    parser = RequestParser(max_payload=LIMIT)
    kept: list[Any] = []
    for piece in split(data, cuts):
        for batch in batches(parser, piece):
            kept += batch
            parser.detach()
    expected = [request.parsed() for request in (*before, *after)]
    rest = [write(noise(LIMIT, 99), number) for number in range(400)]
    late = feed(parser, split(b"".join(r.wire() for r in rest), more))
    assert late == [request.parsed() for request in rest]
    assert copies(kept) == expected


@given(requests, cuts, st.lists(st.booleans(), min_size=40, max_size=40))
def test_detach_changes_nothing_for_what_follows(
    sent: list[Sent], cuts: list[int], detach: list[bool]
) -> None:
    data = b"".join(request.wire() for request in sent)
    parser = RequestParser(max_payload=LIMIT)
    result: list[Parsed] = []
    for piece, leave in zip(split(data, cuts), detach, strict=False):
        result += feed(parser, [piece])
        if leave:
            parser.detach()
    assert result == [request.parsed() for request in sent]


def test_all_payloads_of_a_batch_are_valid_at_once() -> None:
    sent = [write(noise(700, number), number) for number in range(60)]
    parser = RequestParser(b"".join(request.wire() for request in sent)[:-1])
    batch = parser.requests()
    assert [bytes(request[5] or b"") for request in batch] == [r.payload for r in sent[:-1]]


# -- memory ----------------------------------------------------------------------------------------


def test_an_idle_connection_holds_little() -> None:
    assert size_of(RequestParser()) == FIRST_BUFFER <= 4 * KIB


def test_a_large_buffer_is_given_back_after_a_silence() -> None:
    parser = RequestParser()
    half = write(noise(300 * KIB)).wire()
    feed(parser, [half])
    assert parser.large
    feed(parser, [half[:100]])
    parser.shrink()  # in the middle of a request: it goes on
    assert len(feed(parser, [half[100:]])) == 1
    parser.shrink()
    parser.space()
    assert not parser.large
    assert len(feed(parser, [half])) == 1


def test_what_is_announced_costs_nothing_before_it_comes() -> None:
    """The buffer is a mapping, whose pages are not there until they are written to."""
    parser = RequestParser()
    put(parser, write(noise(1)).wire()[:24] + (64 << 20).to_bytes(4, "big"))
    assert parser.requests() == []
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    assert len(parser.space()) >= 64 << 20
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 1000


@pytest.mark.parametrize("end", [RequestParser.close, RequestParser.shrink, RequestParser.detach])
def test_neither_buffer_is_kept(end: Callable[[RequestParser], None]) -> None:
    parser = RequestParser()
    feed(parser, [write(noise(300 * KIB)).wire()])
    buffers = []
    for _ in range(2):
        buffers.append(weakref.ref(parser.space().obj))
        parser.turn_over()
    assert parser.space().obj is buffers[0]()
    assert buffers[1]() is not None
    end(parser)
    if end is not RequestParser.close:
        parser.space()
    assert [buffer() for buffer in buffers] == [None, None]


def test_a_closed_parser_holds_nothing() -> None:
    parser = RequestParser()
    feed(parser, [write(noise(300 * KIB)).wire()])
    parser.close()
    assert not parser.large


@pytest.mark.parametrize("count", [1, 4 * KIB, 64 * KIB, 256 * KIB, 3 * MIB])
def test_a_stream_of_writes_is_held_in_a_bounded_buffer(count: int) -> None:
    """However the pieces fall; one write that is larger than the buffer gets room for itself."""
    request = write(noise(count))
    parser = RequestParser()
    message = request.wire()
    stream = message * max(2, 12 * MIB // len(message) if count > 1 else 100_000)
    largest, done, at, step = 0, 0, 0, 1
    while at < len(stream):
        space = parser.space()
        largest = max(largest, len(space.obj))  # type: ignore[arg-type]
        taken = min(len(space), len(stream) - at, step)
        space[:taken] = stream[at : at + taken]
        parser.received(taken)
        at += taken
        step = step * 3 % 999_983 + 20_000
        for parsed in parser.requests():
            assert parsed[5] is not None
            done += parsed[5] == request.payload
    assert done == len(stream) // len(message)
    assert largest <= max(LARGE_BUFFER, count + 28) + ALIGNMENT


def flood(parser: RequestParser, message: bytes, times: int) -> int:
    """Receive as much at a time as fits; returns the most requests of one batch."""
    return max(map(len, batches(parser, message * times)))


@pytest.mark.parametrize("count", [4 * KIB, 256 * KIB])
def test_a_buffer_that_is_always_full_grows(count: int) -> None:
    """So that a batch is some tens of requests, whatever their size."""
    parser = RequestParser()
    message = write(bytes(count)).wire()
    assert flood(parser, message, 16 * MIB // count) >= min(64, LARGE_BUFFER // len(message))
    assert SMALL_BUFFER < size_of(parser) <= LARGE_BUFFER


@pytest.mark.parametrize("count", [2 * MIB, 8 * MIB])
def test_large_writes_use_one_buffer_again_and_again(count: int) -> None:
    """Also with others between them: to have the memory anew took longer than all the rest."""
    parser = RequestParser()
    large, small = write(bytes(count)).wire(), Sent(0, READ, 1, 0, 512).wire()
    feed(parser, [large])
    buffer = parser.space().obj
    for _ in range(4):
        feed(parser, [small] * (ONCE_MORE // 2))
        feed(parser, [large[:100], large[100:], write(bytes(count - 5000)).wire()])
        assert parser.space().obj is buffer


def test_a_large_write_does_not_keep_its_buffer_for_good() -> None:
    parser = RequestParser()
    feed(parser, [write(bytes(16 * MIB)).wire()])
    assert size_of(parser) >= 16 * MIB
    small = Sent(0, READ, 1, 0, 512).wire()
    feed(parser, [small] * ONCE_MORE)
    assert size_of(parser) <= LARGE_BUFFER


def test_nor_does_it_in_a_silence() -> None:
    parser = RequestParser()
    feed(parser, [write(bytes(16 * MIB)).wire()])
    parser.shrink()
    assert size_of(parser) == FIRST_BUFFER


def test_a_flood_of_small_requests_gets_a_small_buffer() -> None:
    """A parsed request is larger than its 28 bytes: 2 MiB of them would be 20 MiB of objects."""
    small = Sent(0, READ, 1, 0, 1).wire()
    parser = RequestParser()
    assert flood(parser, small, 100_000) <= MANY_REQUESTS
    flood(parser, write(bytes(MIB)).wire(), 8)
    assert size_of(parser) == LARGE_BUFFER
    flood(parser, small, 2 * LARGE_BUFFER // 28)
    assert flood(parser, small, 100_000) <= MANY_REQUESTS
    assert size_of(parser) == SMALL_BUFFER


def test_a_large_write_with_another_behind_it_leaves_no_large_buffer_for_good() -> None:
    """A client that always has the next request under way must not keep 64 MiB for itself."""
    parser = RequestParser()
    data = write(bytes(8 * MIB)).wire()
    small = Sent(0, READ, 1, 0, 512).wire()
    feed(parser, [data + small[:5]])
    for _ in range(ONCE_MORE):
        feed(parser, [small[5:] + small[:5]])
    assert size_of(parser) <= LARGE_BUFFER


def test_an_oversized_payload_is_skipped_not_stored() -> None:
    parser = RequestParser()
    count = 40 * LARGE_BUFFER
    assert count > MAX_PAYLOAD
    header = Sent(0, WRITE, 5, 0, count).wire()
    assert feed(parser, [header + bytes(1000)]) == [(0, WRITE, 5, 0, count, None)]
    left = count - 1000
    while left:
        space = parser.space()
        assert len(space.obj) <= LARGE_BUFFER + ALIGNMENT  # type: ignore[arg-type]
        taken = min(left, len(space))
        parser.received(taken)
        assert parser.requests() == []
        assert parser.partial == (taken < left)
        left -= taken
    sent = Sent(0, READ, 6, 0, 512)
    assert feed(parser, [sent.wire()]) == [sent.parsed()]


def test_the_longest_payload_that_is_taken() -> None:
    parser = RequestParser()
    put(parser, Sent(0, WRITE, 5, 0, MAX_PAYLOAD).wire())
    assert parser.requests() == []
    left = MAX_PAYLOAD
    result: list[object] = []
    while left:
        taken = min(left, len(parser.space()))
        parser.received(taken)
        left -= taken
        result += [(r[2], len(r[5] or b"")) for r in parser.requests()]
    assert result == [(5, MAX_PAYLOAD)]


def test_after_detach_a_small_buffer_has_room_for_what_is_under_way() -> None:
    for begun in (0, 1, 27, 28, 100 * KIB):
        parser = RequestParser()
        request = write(noise(300 * KIB))
        feed(parser, [request.wire()[:begun]])
        parser.detach()
        assert feed(parser, [request.wire()[begun:]]) == [request.parsed(MAX_PAYLOAD)]
        assert size_of(parser) <= LARGE_BUFFER
