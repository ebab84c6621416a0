"""Extended headers, contexts of a device's own, and block sizes: what is on the wire."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import pynbdkit
from pynbdkit.embed import RunningServer
from raw import CACHE, FLUSH, READ, STATUS, TRIM, WRITE, ZEROES, Raw

EIO, EINVAL, EOVERFLOW, ESHUTDOWN = 5, 22, 75, 108
PAYLOAD_LEN, REQ_ONE = 1 << 5, 1 << 3
NONE, DATA, HOLE, STATUS_32, STATUS_64 = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002
MIB, GIB, EIB = 1 << 20, 1 << 30, 1 << 60
SIZE = 4 * EIB
DIRTY, DEPTH = "test:dirty", "test:depth"


class Wide(pynbdkit.Device):
    """A disk of 4 EiB that keeps a note of every call, and has two contexts of its own."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def get_size(self) -> int:
        return SIZE

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        self.calls.append(("pread", count, offset))
        return bytes([offset & 0xFF or 1]) * count

    def pwrite(self, buf: memoryview, offset: int, flags: int) -> None:
        self.calls.append(("pwrite", bytes(buf), offset, flags))

    def flush(self, flags: int) -> None:
        self.calls.append(("flush",))

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("trim", count, offset, flags))

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset, flags))

    def cache(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("cache", count, offset))

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        self.calls.append(("extents", count, offset, flags))
        return [(0, 2 * EIB, 3), (2 * EIB, 2 * EIB, 0)]

    def contexts(self) -> Sequence[str]:
        return (DIRTY, DEPTH)

    def block_status(
        self, context: str, count: int, offset: int, flags: int
    ) -> list[tuple[int, int, int]]:
        self.calls.append((context, count, offset, flags))
        status = 1 << 40 if context == DEPTH else 7
        return [(0, EIB, 0), (EIB, 3 * EIB, status)]


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def server(calls: list[tuple[Any, ...]]) -> Iterator[RunningServer]:
    with pynbdkit.serve(lambda: Wide(calls)) as running:
        yield running


def extended(server: RunningServer, *contexts: str) -> Raw:
    return Raw(server.socket or "", extended=True, contexts=contexts)


# -- requests and replies --------------------------------------------------------------------------


def test_read(server: RunningServer) -> None:
    with extended(server) as client:
        client.ask(READ, 5, 3, 1000)
        data = struct.pack(">Q", 3) + b"\3" * 1000
        assert client.extended_chunk() == (5, 3, 1, DATA, data)


def test_a_read_of_zeros_is_a_hole(calls: list[tuple[Any, ...]]) -> None:
    class Zeros(Wide):
        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

    with pynbdkit.serve(lambda: Zeros(calls)) as server, extended(server) as client:
        client.ask(READ, 5, 512, 65536)
        assert client.extended_chunk() == (5, 512, 1, HOLE, struct.pack(">QI", 512, 65536))


def test_write(server: RunningServer, calls: list[tuple[Any, ...]]) -> None:
    with extended(server) as client:
        client.ask(WRITE, 5, SIZE - 5, 5, PAYLOAD_LEN, b"hello")
        client.ask(WRITE, 6, 7, 5, PAYLOAD_LEN | 1, b"world")
        assert client.extended_chunk() == (5, SIZE - 5, 1, NONE, b"")
        assert client.extended_chunk() == (6, 7, 1, NONE, b"")
    assert calls == [("pwrite", b"hello", SIZE - 5, 0), ("pwrite", b"world", 7, 0), ("flush",)]


@pytest.mark.parametrize(
    ("kind", "count", "call"),
    [
        (TRIM, SIZE, ("trim", SIZE, 0, 0)),
        (ZEROES, SIZE, ("zero", SIZE, 0, 1)),
        (CACHE, SIZE, ("cache", SIZE, 0)),
        (FLUSH, 0, ("flush",)),
    ],
)
def test_the_whole_disk_in_one_request(
    server: RunningServer,
    calls: list[tuple[Any, ...]],
    kind: int,
    count: int,
    call: tuple[Any, ...],
) -> None:
    with extended(server) as client:
        client.ask(kind, 5, 0, count)
        assert client.extended_chunk() == (5, 0, 1, NONE, b"")
    assert calls == [call]


def test_a_write_without_the_flag_has_its_payload_all_the_same(
    server: RunningServer, calls: list[tuple[Any, ...]]
) -> None:
    """QEMU 10 does not set the flag; what it writes may look like a request."""
    data = struct.pack(">IHHQQQ", 0x21E41C71, 0, TRIM, 7, 0, 512)
    with extended(server) as client:
        client.ask(WRITE, 5, 512, len(data), 0, data)
        assert client.extended_chunk() == (5, 512, 1, NONE, b"")
        client.ask(FLUSH, 6)
        assert client.extended_chunk()[0] == 6
    assert calls == [("pwrite", data, 512, 0), ("flush",)]


def test_a_reply_tells_the_requests_offset_again(server: RunningServer) -> None:
    with extended(server) as client:
        client.ask(TRIM, 5, 4096, 512)
        assert client.extended_chunk() == (5, 4096, 1, NONE, b"")


class Slow(pynbdkit.Device):
    """A disk of 4 EiB without zero and cache: they are done by pwrite and pread, in pieces."""

    def __init__(self) -> None:
        self.pieces = threading.Semaphore(0)

    def get_size(self) -> int:
        return SIZE

    def can_cache(self) -> int:
        return pynbdkit.CacheMode.EMULATE

    def pread(self, count: int, offset: int, flags: int) -> bytes:
        self.pieces.release()
        return bytes(count)

    def pwrite(self, buf: memoryview, offset: int, flags: int) -> None:
        self.pieces.release()


@pytest.mark.parametrize("kind", [ZEROES, CACHE])
@pytest.mark.parametrize("ending", ["the client goes", "the server stops"])
def test_what_would_take_for_ever_ends_with_its_connection(kind: int, ending: str) -> None:
    device = Slow()
    server = pynbdkit.serve(lambda: device)
    client = extended(server)
    client.ask(kind, 5, 0, SIZE)
    for _ in range(3):
        assert device.pieces.acquire(timeout=20)
    if ending == "the client goes":
        client.close()
        with extended(server) as other:
            other.ask(READ, 6, 0, 512)
            assert other.extended_chunk()[0] == 6
    server.stop()  # else it would wait here
    if ending == "the server stops":
        cookie, _, _, kind, body = client.extended_chunk()
        assert (cookie, kind, int.from_bytes(body[:4], "big")) == (5, ERROR, ESHUTDOWN)
        client.close()


@pytest.mark.parametrize(
    ("kind", "offset", "count", "flags", "payload", "chunk"),
    [
        (WRITE, SIZE, 512, PAYLOAD_LEN | 1 << 9, bytes(512), ERROR),
        (READ, 4, 512, PAYLOAD_LEN, bytes(512), ERROR_OFFSET),
        (TRIM, 0, 4, PAYLOAD_LEN, b"abcd", ERROR),
        (FLUSH, 0, 4, PAYLOAD_LEN, b"abcd", ERROR),
        (FLUSH, 0, 0, PAYLOAD_LEN, b"", ERROR),
        (99, 0, 4, PAYLOAD_LEN, b"abcd", ERROR),
        (TRIM, 2**64 - 1, 2**64 - 1, 0, b"", ERROR),
        (READ, 0, 2**64 - 1, 0, b"", ERROR_OFFSET),
        (READ, 0, 64 * MIB + 1, 0, b"", ERROR_OFFSET),
        (READ, 512, 0, 0, b"", ERROR),  # an offset would have to lie within the request
        (WRITE, 0, 0, PAYLOAD_LEN, b"", ERROR),
    ],
)
def test_a_bad_request_is_refused_and_the_connection_goes_on(
    server: RunningServer,
    calls: list[tuple[Any, ...]],
    kind: int,
    offset: int,
    count: int,
    flags: int,
    payload: bytes,
    chunk: int,
) -> None:
    with extended(server) as client:
        client.ask(kind, 5, offset, count, flags, payload)
        cookie, at, done, found, body = client.extended_chunk()
        assert (cookie, at, done, found) == (5, offset, 1, chunk)
        assert int.from_bytes(body[:4], "big") == EINVAL
        assert calls == []
        client.ask(FLUSH, 6)
        assert client.extended_chunk() == (6, 0, 1, NONE, b"")


def test_an_oversized_payload_is_skipped(server: RunningServer) -> None:
    count = 64 * MIB + 1
    with extended(server) as client:
        # The answer may come before the last byte is sent: so send and receive at one time.
        sender = threading.Thread(
            target=client.ask, args=(WRITE, 5, 0, count, PAYLOAD_LEN, bytes(count))
        )
        sender.start()
        cookie, _, _, kind, body = client.extended_chunk()
        sender.join()
        assert (cookie, kind, int.from_bytes(body[:4], "big")) == (5, ERROR, EINVAL)
        client.ask(FLUSH, 6)
        assert client.extended_chunk()[0] == 6


def test_the_devices_errors(calls: list[tuple[Any, ...]]) -> None:
    class Broken(Wide):
        def pread(self, count: int, offset: int, flags: int) -> bytes:
            raise OSError(EIO, "no such luck")

        def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
            raise OSError(EOVERFLOW, "no map")

    with (
        pynbdkit.serve(lambda: Broken(calls)) as server,
        extended(server, "base:allocation") as client,
    ):
        client.ask(READ, 5, 512, 512)
        cookie, at, _, kind, body = client.extended_chunk()
        assert (cookie, at, kind, body[:4]) == (5, 512, ERROR_OFFSET, b"\0\0\0\5")
        assert body[-8:] == struct.pack(">Q", 512)
        client.ask(STATUS, 6, 512, 512)
        cookie, at, _, kind, body = client.extended_chunk()
        assert (cookie, at, kind, body[:4]) == (6, 512, ERROR, b"\0\0\0\x4b")


def test_a_magic_number_of_the_other_form_ends_the_connection(server: RunningServer) -> None:
    with extended(server) as client:
        client.send(Raw.request(FLUSH) + bytes(4))
        assert client.at_end()


# -- block status ----------------------------------------------------------------------------------


def status(context: int, *pairs: tuple[int, int]) -> bytes:
    body = struct.pack(">II", context, len(pairs))
    return body + b"".join(struct.pack(">QQ", *pair) for pair in pairs)


def test_block_status_of_the_whole_disk(
    server: RunningServer, calls: list[tuple[Any, ...]]
) -> None:
    with extended(server, "base:allocation") as client:
        number = client.ids["base:allocation"]
        client.ask(STATUS, 5, 0, SIZE)
        answer = status(number, (2 * EIB, 3), (2 * EIB, 0))
        assert client.extended_chunk() == (5, 0, 1, STATUS_64, answer)
        client.ask(STATUS, 6, EIB, SIZE - EIB, REQ_ONE)
        assert client.extended_chunk() == (6, EIB, 1, STATUS_64, status(number, (EIB, 3)))
    assert calls == [("extents", SIZE, 0, 0), ("extents", SIZE - EIB, EIB, 4)]


def test_a_chunk_for_each_context(server: RunningServer) -> None:
    with extended(server, "base:allocation", DIRTY, DEPTH, "test:unknown") as client:
        assert sorted(client.ids) == ["base:allocation", DEPTH, DIRTY]
        client.ask(STATUS, 5, 0, SIZE)
        chunks = [client.extended_chunk() for _ in range(3)]
        assert [chunk[:4] for chunk in chunks] == [
            (5, 0, 0, STATUS_64),
            (5, 0, 0, STATUS_64),
            (5, 0, 1, STATUS_64),
        ]
        assert sorted(chunk[4] for chunk in chunks) == sorted(
            (
                status(client.ids["base:allocation"], (2 * EIB, 3), (2 * EIB, 0)),
                status(client.ids[DIRTY], (EIB, 0), (3 * EIB, 7)),
                status(client.ids[DEPTH], (EIB, 0), (3 * EIB, 1 << 40)),
            )
        )


def test_a_payload_says_which_contexts(server: RunningServer, calls: list[tuple[Any, ...]]) -> None:
    with extended(server, "base:allocation", DIRTY, DEPTH) as client:
        assert client.flags & 1 << 12  # BLOCK_STATUS_PAYLOAD
        payload = struct.pack(">QI", 2 * EIB, client.ids[DIRTY])
        client.ask(STATUS, 5, 0, len(payload), PAYLOAD_LEN, payload)
        answer = status(client.ids[DIRTY], (EIB, 0), (EIB, 7))
        assert client.extended_chunk() == (5, 0, 1, STATUS_64, answer)
        payload = struct.pack(">QII", GIB, client.ids[DEPTH], client.ids[DIRTY])
        client.ask(STATUS, 6, EIB, len(payload), PAYLOAD_LEN | REQ_ONE, payload)
        found = sorted(client.extended_chunk()[4] for _ in range(2))
        assert found == sorted(
            (status(client.ids[DIRTY], (GIB, 7)), status(client.ids[DEPTH], (GIB, 1 << 40)))
        )
    assert [call[0] for call in calls] == [DIRTY, DEPTH, DIRTY]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack(">Q", GIB),
        struct.pack(">QI", GIB, 99),
        struct.pack(">QII", GIB, 1, 1),
        struct.pack(">QIH", GIB, 1, 2),
        struct.pack(">QI", 0, 1),
        struct.pack(">QI", SIZE + 1, 1),
        struct.pack(">QI", GIB, 1) + bytes(64 * MIB),
    ],
    ids=["nothing", "no context", "unknown", "twice", "odd", "no length", "too long", "oversized"],
)
def test_a_payload_that_is_wrong(
    server: RunningServer, calls: list[tuple[Any, ...]], payload: bytes
) -> None:
    with extended(server, "base:allocation", DIRTY) as client:
        sender = threading.Thread(
            target=client.ask, args=(STATUS, 5, 0, len(payload), PAYLOAD_LEN, payload)
        )
        sender.start()
        cookie, _, _, kind, body = client.extended_chunk()
        sender.join()
        assert (cookie, kind, int.from_bytes(body[:4], "big")) == (5, ERROR, EINVAL)
        assert calls == []
        client.ask(FLUSH, 6)
        assert client.extended_chunk()[0] == 6


def test_contexts_without_extended_headers(server: RunningServer) -> None:
    """Lengths are of 32 bits, in chunks of the old form; one context after the other."""
    with Raw(server.socket or "", structured=True, contexts=("base:allocation", DIRTY)) as client:
        assert not client.flags & 1 << 12
        client.ask(STATUS, 5, EIB - 512, 1024)
        first, last = client.chunk(), client.chunk()
        assert (first[:3], last[:3]) == ((5, 0, STATUS_32), (5, 1, STATUS_32))
        assert sorted((first[3], last[3])) == sorted(
            (
                struct.pack(">III", client.ids["base:allocation"], 1024, 3),
                struct.pack(">IIIII", client.ids[DIRTY], 512, 0, 512, 7),
            )
        )


def test_a_status_that_needs_64_bits_is_refused_without_them(server: RunningServer) -> None:
    with Raw(server.socket or "", structured=True, contexts=(DEPTH,)) as client:
        client.ask(STATUS, 5, EIB, 512)
        cookie, _, kind, body = client.chunk()
        assert (cookie, kind, int.from_bytes(body[:4], "big")) == (5, ERROR, EOVERFLOW)
        assert b"extended headers" in body
        client.ask(STATUS, 6, 0, 512)
        assert client.chunk()[2] == STATUS_32


def test_no_context_no_status(server: RunningServer) -> None:
    with extended(server) as client:
        assert not client.flags & 1 << 12
        client.ask(STATUS, 5, 0, 512)
        assert client.extended_chunk()[3] == ERROR


def test_a_devices_contexts_are_listed(server: RunningServer, nbd: Any) -> None:
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(server.socket)
    found: list[str] = []
    handle.opt_list_meta_context(found.append)
    assert found == ["base:allocation", DIRTY, DEPTH]
    handle.add_meta_context("test:")
    found.clear()
    handle.opt_list_meta_context(found.append)
    assert found == [DIRTY, DEPTH]
    handle.opt_abort()


def test_a_client_without_a_word_of_it(server: RunningServer, nbd: Any) -> None:
    """libnbd's callbacks, from the form that it knows."""
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.add_meta_context(DIRTY)
    handle.connect_unix(server.socket)
    assert handle.can_meta_context(DIRTY)
    found: dict[str, list[int]] = {}
    handle.block_status(
        1 << 20, EIB - 4096, lambda name, _offset, pairs, _error: found.update({name: pairs})
    )
    assert found == {"base:allocation": [1 << 20, 3], DIRTY: [4096, 0, (1 << 20) - 4096, 7]}
    handle.shutdown()


# -- filters between client and device -------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "parameters", "seen"),
    [
        (["nofilter"], {}, [(EIB - 512, 0), (512, 7)]),
        (["offset"], {"offset": "512"}, [(EIB - 1024, 0), (1024, 7)]),
        (["offset"], {"range": str(3 * EIB)}, [(EIB - 512, 0), (512, 7)]),
        (["delay", "error"], {"delay-extents": "1ms"}, [(EIB - 512, 0), (512, 7)]),
        (["noextents"], {}, [(EIB - 512, 0), (512, 7)]),
        (["cow"], {}, None),
    ],
)
def test_filters(
    calls: list[tuple[Any, ...]],
    filters: list[str],
    parameters: dict[str, str],
    seen: list[tuple[int, int]] | None,
) -> None:
    """What moves the content moves its status, too, or hides the context."""
    with (
        pynbdkit.serve(lambda: Wide(calls), filters=filters, parameters=parameters) as server,
        extended(server, DIRTY) as client,
    ):
        if seen is None:
            assert client.ids == {}
            return
        client.ask(STATUS, 5, 512, EIB)
        cookie, _, _, kind, body = client.extended_chunk()
        assert (cookie, kind) == (5, STATUS_64)
        assert body == status(client.ids[DIRTY], *seen)


def test_the_log_filter_logs_it(calls: list[tuple[Any, ...]], tmp_path: Any) -> None:
    file = tmp_path / "log"
    with (
        pynbdkit.serve(
            lambda: Wide(calls), filters=["log"], parameters={"logfile": str(file)}
        ) as server,
        extended(server, DIRTY) as client,
    ):
        client.ask(STATUS, 5, 512, 1024)
        assert client.extended_chunk()[3] == STATUS_64
    assert f"BlockStatus id=1 context={DIRTY} offset=0x200 count=0x400" in file.read_text()


@pytest.mark.parametrize(
    "names",
    [("dirty",), ("base:allocation",), ("base:more",), ("x:",), (":x",), (7,), ["x:y", "z"], 5],
)
def test_names_that_cannot_be_contexts(calls: list[tuple[Any, ...]], names: Any) -> None:
    class Named(Wide):
        def contexts(self) -> Any:
            return names

    with pynbdkit.serve(lambda: Named(calls)) as server, pytest.raises((AssertionError, EOFError)):
        extended(server, "x:y").close()


# -- block sizes -----------------------------------------------------------------------------------


class Blocks(Wide):
    """4 KiB at least, 64 KiB at most; the last block is not whole."""

    def get_size(self) -> int:
        return MIB + 100

    def block_size(self) -> tuple[int, int, int]:
        return 4096, 4096, 65536


@pytest.mark.parametrize("form", ["simple", "extended"])
@pytest.mark.parametrize(
    ("kind", "offset", "count", "good"),
    [
        (READ, 4096, 4096, True),
        (READ, 4096, 65536, True),
        (READ, 4096, 65536 + 4096, False),
        (READ, 4096, 512, False),
        (READ, 512, 4096, False),
        (READ, MIB, 100, True),
        (READ, MIB - 4096, 4196, True),
        (READ, MIB + 50, 50, False),
        (READ, MIB, 50, False),
        (WRITE, 4096, 4096, True),
        (WRITE, 4096, 65536 + 4096, False),
        (WRITE, 1, 4096, False),
        (WRITE, 0, 4097, False),
        (WRITE, MIB, 100, True),
        (TRIM, 0, MIB, True),  # the maximum is for payloads
        (TRIM, 0, 511, False),
        (ZEROES, 0, MIB + 100, True),
        (ZEROES, 2048, 4096, False),
        (CACHE, 0, MIB, True),
        (CACHE, 100, 100, False),
    ],
)
def test_block_sizes_are_enforced(
    calls: list[tuple[Any, ...]], form: str, kind: int, offset: int, count: int, good: bool
) -> None:
    with (
        pynbdkit.serve(lambda: Blocks(calls)) as server,
        Raw(server.socket or "", extended=form == "extended") as client,
    ):
        payload = bytes(count) if kind == WRITE else b""
        flags = PAYLOAD_LEN if kind == WRITE and client.extended else 0
        client.ask(kind, 5, offset, count, flags, payload)
        if client.extended:
            _, _, _, chunk, body = client.extended_chunk()
            error = int.from_bytes(body[:4], "big") if chunk in (ERROR, ERROR_OFFSET) else 0
            if not good:
                word = b"maximum" if b"maximum" in body else b"not aligned to 4096 bytes"
                assert word in body
        else:
            error = client.simple(count if kind == READ else 0)[1]
        assert error == (0 if good else EINVAL)
        assert len(calls) == good
