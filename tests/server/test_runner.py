"""Requests to replies, without a socket: batches, their end, and writes that are held.

What each request gets for an answer is in test_transmission.py; here is when calls are made, that
the short way and the long way agree, and what is left when a batch is left.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbdkit import Device, Fua, Session
from pynbdkit.complete import Layer
from pynbdkit.protocol.constants import MAX_PAYLOAD
from pynbdkit.protocol.negotiated import ExportInfo, Negotiated
from pynbdkit.server import runner
from pynbdkit.server.receiver import Disconnect
from pynbdkit.server.runner import GATHER, ZEROS_AT_ONCE, Runner
from raw import DISC, FLUSH, READ, TRIM, WRITE, ZEROES

SIZE = 1 << 20
EIO, EINVAL, ENOSPC = 5, 22, 28
FUA = 1
CONTENT = bytes(range(251)) * (SIZE // 251 + 1)
Request = tuple[int, int, int, int, int, memoryview | None]


class Disk(Device):
    """`calls` has what was called; `failures` fail a call of that name and offset."""

    def __init__(self, *, block_size: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[tuple[str, int], BaseException] = {}
        self.sizes = block_size
        self.fua = int(Fua.NATIVE)
        self.writable = True

    def get_size(self) -> int:
        return SIZE

    def block_size(self) -> tuple[int, int, int]:
        return self.sizes

    def can_fua(self) -> int:
        return self.fua

    def can_write(self) -> bool:
        return self.writable

    def _called(self, name: str, offset: int, *numbers: Any) -> None:
        self.calls.append((name, offset, *numbers))
        failure = self.failures.get((name, offset))
        if failure is not None:
            raise failure

    def pread(self, count: int, offset: int, flags: int) -> Any:
        self._called("pread", offset, count, flags)
        return CONTENT[offset : offset + count]

    def pwrite(self, buf: Any, offset: int, flags: int) -> None:
        self._called("pwrite", offset, bytes(buf), flags)

    def flush(self, flags: int) -> None:
        self._called("flush", 0)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._called("trim", offset, count, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._called("zero", offset, count, flags)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Grouping(Disk):
    """Makes writes with FUA stable together, as `answer` says."""

    def __init__(self, answer: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.answer = answer

    def pwrite_group(self, writes: Sequence[tuple[Any, int]]) -> bool:
        self.calls.append(("group", [(offset, bytes(buf)) for buf, offset in writes]))
        return self.answer()


class Crew:
    """What a runner knows of the threads."""

    def __init__(self, working: bool) -> None:
        self.working = working
        self.given: list[tuple[list[int], bool]] = []

    def dispatch(self, requests: Sequence[Request], grouped: bool = True) -> None:
        self.given.append(([request[2] for request in requests], grouped))


def of(disk: Disk, *, structured: bool = False, extended: bool = False) -> Runner:
    negotiated = Negotiated(ExportInfo("", SIZE, 0), structured, True, (), extended)
    return Runner(Layer(disk, Session(), "disks"), negotiated, "disks")


def read(cookie: int, offset: int, count: int = 512) -> Request:
    return 0, READ, cookie, offset, count, None


def write(cookie: int, offset: int, count: int = 512, flags: int = 0) -> Request:
    return flags, WRITE, cookie, offset, count, memoryview(bytes([cookie % 256]) * count)


def sent(one: Runner) -> bytes:
    return b"".join(one.ready)


def errors(one: Runner, cookies: Sequence[int]) -> list[int]:
    """The errors of simple replies without data, which must have these cookies, in order."""
    data = sent(one)
    replies = [data[at : at + 16] for at in range(0, len(data), 16)]
    assert [int.from_bytes(reply[8:], "big") for reply in replies] == list(cookies)
    return [int.from_bytes(reply[4:8], "big") for reply in replies]


# -- the short way and the long way ----------------------------------------------------------------

numbers = st.one_of(
    st.integers(0, 70_000),
    st.sampled_from([0, 1, 511, 512, 4096, SIZE - 1, SIZE, SIZE + 1, MAX_PAYLOAD, 1 << 32]),
    st.integers(0, 2048).map(lambda n: n * 512),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.sampled_from([READ, READ, WRITE, WRITE, FLUSH, TRIM, ZEROES, 5, 7, 99]))
    flags = draw(st.sampled_from([0, 0, 0, FUA, FUA, 2, 4, FUA | 4, 16, 32, 1 << 15]))
    offset = draw(st.one_of(numbers, st.integers(SIZE - 1024, SIZE), st.just((1 << 64) - 1)))
    count = draw(numbers)
    payload = None
    if kind == WRITE and 0 < count <= SIZE:
        payload = memoryview(CONTENT)[:count]
    return flags, kind, 7, offset, count, payload


common = st.builds(
    lambda kind, flags, offset, count: (
        flags, kind, 7, offset, count, memoryview(CONTENT)[:count] if kind == WRITE else None
    ),
    st.sampled_from([READ, WRITE]),
    st.sampled_from([0, FUA]),
    st.integers(0, 200).map(lambda n: n * 512),
    st.integers(1, 128).map(lambda n: n * 512),
)  # fmt: skip


@given(
    st.lists(st.one_of(requests(), common), min_size=1, max_size=5),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.sampled_from([(0, 0, 0), (1, 512, 0xFFFFFFFF), (512, 4096, 65536)]),
    st.sampled_from([True, True, False]),
    st.sampled_from([int(Fua.NONE), int(Fua.NATIVE)]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_both_ways_agree(
    batch: list[Request],
    form: tuple[bool, bool],
    sizes: tuple[int, int, int],
    writable: bool,
    fua: int,
    failing: bool,
) -> None:
    """`run_batch` does the two common requests by itself: exactly as `run_request` would."""
    results = []
    for short in (True, False):
        disk = Disk(block_size=sizes)
        disk.writable, disk.fua = writable, fua
        if failing:
            disk.failures = {
                (name, request[3]): OSError(errno.ENOSPC, "full")
                for request in batch[::2]
                for name in ("pread", "pwrite", "trim", "zero")
            }
        one = of(disk, structured=form[0], extended=form[1])
        if short:
            left = iter(batch)
            while one.run_batch(left):
                pass
        else:
            for request in batch:
                one.run_request(*request)
        results.append((disk.calls, sent(one)))
    assert results[0] == results[1]


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("flags", [0, FUA], ids=["short way", "long way"])
def test_a_batch_is_left_when_there_is_much_to_send(form: tuple[bool, bool], flags: int) -> None:
    count = GATHER // 8
    one = of(Disk(), structured=form[0], extended=form[1])
    batch = deque((flags, READ, cookie, 512 * cookie, count, None) for cookie in range(20))
    left = iter(batch.popleft, None)
    sizes = []
    more = True
    while more:
        try:
            more = one.run_batch(left)
        except IndexError:
            more = False
        sizes.append(sum(len(piece) == count for piece in one.ready))
        one.ready.clear()
    assert sizes == [8, 8, 4]


def test_writes_are_not_much_to_send() -> None:
    one = of(Disk())
    assert not one.run_batch(iter([write(n, 0, GATHER // 2) for n in range(8)]))
    assert errors(one, range(8)) == [0] * 8


def test_a_hole_is_not_much_to_send() -> None:
    class Empty(Disk):
        def pread(self, count: int, offset: int, flags: int) -> bytes:
            return bytes(count)

    one = of(Empty(), structured=True)
    assert not one.run_batch(iter([read(n, 0, GATHER // 2) for n in range(8)]))
    assert len(one.ready) == 8


def test_a_goodbye_ends_the_batch_and_what_came_before_is_answered() -> None:
    disk = Grouping()
    one = of(disk)
    left = iter([write(1, 0), write(2, 512, flags=FUA), (0, DISC, 3, 0, 0, None), write(4, 0)])
    assert not one.goodbye
    with pytest.raises(Disconnect, match=r"^$"):
        one.run_batch(left)
    assert one.goodbye
    assert errors(one, [1, 2]) == [0, 0]
    assert disk.names() == ["pwrite", "pwrite"]
    assert [request[2] for request in left] == [4]


# -- writes with FUA -------------------------------------------------------------------------------


def test_writes_with_fua_that_follow_each_other_are_made_stable_together() -> None:
    disk = Grouping()
    one = of(disk)
    writes = [write(n, 512 * n, flags=FUA) for n in range(4)]
    batch = [writes[0], writes[1], read(9, 0), writes[2], writes[3], write(8, 0), writes[0]]
    assert not one.run_batch(iter(batch))
    groups = [[offset for offset, _ in call[1]] for call in disk.calls if call[0] == "group"]
    assert groups == [[0, 512], [1024, 1536]]
    # What comes next waits for them; one alone is written as it is.
    assert disk.names() == ["group", "pread", "group", "pwrite", "pwrite"]
    assert disk.calls[-1] == ("pwrite", 0, bytes(512), Fua.NATIVE)
    del one.ready[2:4]  # the read's
    assert errors(one, [0, 1, 2, 3, 8, 0]) == [0] * 6


@pytest.mark.parametrize("kind", [FLUSH, TRIM, ZEROES])
def test_whatever_comes_next_waits_for_them(kind: int) -> None:
    disk = Grouping()
    one = of(disk)
    count = 0 if kind == FLUSH else 512
    last = (0, kind, 3, 0, count, None)
    one.run_batch(iter([write(1, 0, flags=FUA), write(2, 512, flags=FUA), last]))
    assert disk.names() == ["group", {FLUSH: "flush", TRIM: "trim", ZEROES: "zero"}[kind]]
    assert errors(one, [1, 2, 3]) == [0, 0, 0]


def test_the_payloads_of_a_group_are_those_of_the_client() -> None:
    disk = Grouping()
    of(disk).run_batch(iter([write(1, 0, 3, FUA), write(2, 99, 5, FUA)]))
    assert disk.calls == [("group", [(0, b"\1\1\1"), (99, b"\2\2\2\2\2")])]


@pytest.mark.parametrize("end", ["goodbye", "taken over", "much to send"])
def test_what_is_held_is_written_however_the_batch_ends(end: str) -> None:
    disk = Grouping()
    one = of(disk)
    batch = deque([write(1, 0, flags=FUA), write(2, 512, flags=FUA)])
    if end == "goodbye":
        batch.append((0, DISC, 3, 0, 0, None))
        with pytest.raises(Disconnect):
            one.run_batch(iter(batch))
    elif end == "taken over":
        with pytest.raises(IndexError):
            one.run_batch(iter(batch.popleft, None))
    else:
        batch.append(read(3, 0, SIZE))
        assert one.run_batch(iter(batch))
        del one.ready[2:]
    assert disk.names()[0] == "group"
    assert errors(one, [1, 2]) == [0, 0]


def nothing_at_once() -> bool:
    return False


def wrong() -> bool:
    raise OSError(errno.EIO, "one of them")


@pytest.mark.parametrize("answer", [nothing_at_once, wrong])
def test_a_group_that_is_not_made_is_written_one_by_one(answer: Callable[[], bool]) -> None:
    """And each gets its own answer."""
    disk = Grouping(answer)
    disk.failures = {("pwrite", 512): OSError(errno.ENOSPC, "full")}
    one = of(disk)
    assert not one.run_batch(iter([write(n, 512 * n, flags=FUA) for n in range(3)]))
    assert disk.names() == ["group", "pwrite", "pwrite", "pwrite"]
    assert errors(one, range(3)) == [0, ENOSPC, 0]


def test_one_that_must_be_refused_is_in_no_group() -> None:
    disk = Grouping()
    disk.sizes = (512, 4096, 0xFFFFFFFF)
    one = of(disk)
    batch = [write(1, 0, flags=FUA), write(2, 100, flags=FUA), write(3, SIZE, flags=FUA)]
    for request in batch:
        assert one.run_group([batch[0], request]) == (request[3] == 0)
    disk.calls.clear()
    one.ready.clear()
    assert not one.run_batch(iter(batch))
    assert disk.names() == ["pwrite"]
    assert errors(one, [1, 2, 3]) == [0, EINVAL, ENOSPC]


@pytest.mark.parametrize(
    ("working", "count", "together", "what"),
    [
        (False, 1, True, "written"),
        (False, 2, True, "grouped"),
        (True, 1, True, "grouped"),  # others that run may be made stable by the same sync
        (False, 1, False, "written"),
        (False, 2, False, "given"),
        (True, 1, False, "given"),
    ],
)
def test_who_writes_what_was_held(working: bool, count: int, together: bool, what: str) -> None:
    disk = Grouping(lambda: together)
    one = of(disk)
    crew = Crew(working)
    one.crew = crew  # type: ignore[assignment]
    one.run_batch(iter([write(n, 512 * n, flags=FUA) for n in range(count)]))
    if what == "given":  # and not to be grouped again
        assert crew.given == [(list(range(count)), False)]
        assert sent(one) == b""
    else:
        assert crew.given == []
        assert errors(one, range(count)) == [0] * count
        assert disk.names()[-1] == ("pwrite" if what == "written" else "group")


def test_what_takes_long_by_nature_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that writes with FUA do not count as calls that wait."""
    times = iter(range(0, 1000, 3))
    monkeypatch.setattr(runner, "perf_counter", lambda: next(times))
    one = of(Grouping())
    one.run_batch(iter([read(1, 0), write(2, 0)]))
    assert one.waited == 0
    one.run_batch(iter([write(1, 0, flags=FUA), write(2, 0, flags=FUA), write(3, 0)]))
    assert one.waited == 3


# -- zeros -----------------------------------------------------------------------------------------


@given(
    st.one_of(
        st.integers(1, 300),
        st.integers(-3, 3).map(lambda n: ZEROS_AT_ONCE + n),
        st.integers(-3, 3).map(lambda n: 3 * ZEROS_AT_ONCE + n),
    ),
    st.data(),
)
@settings(deadline=None)
def test_zeros_are_seen_and_nothing_else(count: int, data: st.DataObject) -> None:
    buffer = bytearray(count)
    assert runner._is_zero(bytes(buffer), count)
    assert runner._is_zero(buffer, count)
    buffer[data.draw(st.integers(0, count - 1))] = data.draw(st.integers(1, 255))
    for form in (bytes, bytearray, memoryview):
        assert not runner._is_zero(form(buffer), count)
