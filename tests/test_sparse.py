"""SparseArray against a plain bytearray, and what it does with memory, sizes and threads."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbdkit.sparse import PAGE_SIZE, SparseArray

SIZE = 5 * PAGE_SIZE + 1000


class Under:
    """A base that is plain bytes, with `holes` (whole pages) that it tells of."""

    def __init__(self, content: bytes, holes: frozenset[int]) -> None:
        self.content = content
        self.holes = holes

    def fill(self, out: memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(out) <= len(self.content)
        assert not any(out), "the buffer must come as zeros"
        out[:] = self.content[offset : offset + len(out)]

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for page in range(start // PAGE_SIZE, -(-end // PAGE_SIZE)):
            if page not in self.holes:
                yield max(page * PAGE_SIZE, start), min((page + 1) * PAGE_SIZE, end)


def under(holes: frozenset[int]) -> Under:
    content = bytearray((index * 7 + index // 251) % 255 + 1 for index in range(SIZE))
    for page in holes:
        end = min((page + 1) * PAGE_SIZE, SIZE)
        content[page * PAGE_SIZE : end] = bytes(end - page * PAGE_SIZE)
    return Under(bytes(content), holes)


BASES = (None, under(frozenset()), under(frozenset((0, 2, 3))), under(frozenset((5,))))

# Offsets close to the borders of pages, where the mistakes are.
edges = st.builds(
    lambda page, delta: min(max(page * PAGE_SIZE + delta, 0), SIZE),
    st.integers(0, 6),
    st.one_of(st.integers(-2, 2), st.integers(-PAGE_SIZE, PAGE_SIZE)),
)
ranges = st.tuples(edges, edges).map(lambda pair: (min(pair), max(pair)))
operations = st.lists(
    st.tuples(st.sampled_from(("write", "write", "zero", "write zeros")), ranges, st.integers()),
    max_size=14,
)


def check_extents(array: SparseArray, model: bytes | bytearray, offset: int, count: int) -> None:
    extents = list(array.extents(count, offset))
    position = offset
    for start, length, kind in extents:
        assert start == position
        assert length > 0
        assert kind in (0, 3)
        if kind == 3:
            assert not any(model[start : start + length]), "a hole that holds data"
        position += length
    assert position == offset + count
    assert all(left[2] != right[2] for left, right in pairwise(extents))


@settings(max_examples=100, deadline=None)
@given(base=st.sampled_from(BASES), operations=operations, reads=st.lists(ranges, max_size=6))
def test_like_a_bytearray(
    base: Under | None,
    operations: list[tuple[str, tuple[int, int], int]],
    reads: list[tuple[int, int]],
) -> None:
    array = SparseArray(SIZE, base)
    model = bytearray(base.content if base else SIZE)
    for what, (start, end), seed in operations:
        if what == "write":
            content = bytes(((seed + index) % 255) + 1 for index in range(end - start))
            array.write(content, start)
        else:
            content = bytes(end - start)
            if what == "zero":
                array.zero(end - start, start)
            else:
                array.write(content, start)
        model[start:end] = content
        check_extents(array, model, 0, SIZE)
    for start, end in reads:
        assert bytes(array.read(end - start, start)) == model[start:end]
        check_extents(array, model, start, end - start)
    assert bytes(array.read(SIZE, 0)) == model
    array.zero(SIZE, 0)
    assert array.allocated == 0
    assert list(array.extents(SIZE, 0)) == [(0, SIZE, 3)]
    assert not any(array.read(SIZE, 0))


@pytest.mark.parametrize("base", BASES[:2], ids=["empty", "base"])
@pytest.mark.parametrize(
    ("operation", "count", "offset"),
    [
        ("read", 1, SIZE),
        ("read", 2, SIZE - 1),
        ("read", PAGE_SIZE * 3, SIZE - PAGE_SIZE),
        ("read", 1, -1),
        ("write", 1, SIZE),
        ("write", 2, SIZE - 1),
        ("write", 1, -1),
        ("zero", 2, SIZE - 1),
        ("zero", 1, -1),
        ("extents", 2, SIZE - 1),
    ],
)
def test_outside_is_refused(base: Under | None, operation: str, count: int, offset: int) -> None:
    array = SparseArray(SIZE, base)
    with pytest.raises(ValueError, match="not within the array"):
        if operation == "write":
            array.write(b"x" * count, offset)
        else:
            list(getattr(array, operation)(count, offset) or ())
    assert array.allocated == 0


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"2\*\*63"):
        SparseArray(size)


def test_the_largest_disk_costs_only_what_is_written() -> None:
    size = (1 << 63) - 1
    tracemalloc.start()
    try:
        array = SparseArray(size)
        array.write(b"end", size - 3)
        array.write(b"middle", 1 << 62)
        assert bytes(array.read(5, size - 5)) == b"\0\0end"
        extents = list(array.extents(size, 0))
        assert [kind for _, _, kind in extents] == [3, 0, 3, 0]
        assert extents[1][:2] == (1 << 62, PAGE_SIZE)
        assert sum(length for _, length, _ in extents) == size
        array.zero(size, 0)
        assert list(array.extents(size, 0)) == [(0, size, 3)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_zeros_give_pages_back() -> None:
    array = SparseArray(8 * PAGE_SIZE)
    array.write(b"x" * (8 * PAGE_SIZE), 0)
    assert array.allocated == 8 * PAGE_SIZE
    array.zero(2 * PAGE_SIZE, PAGE_SIZE)
    assert array.allocated == 6 * PAGE_SIZE
    array.write(bytes(PAGE_SIZE), 4 * PAGE_SIZE)
    assert array.allocated == 5 * PAGE_SIZE
    array.zero(PAGE_SIZE - 1, 6 * PAGE_SIZE)
    assert array.allocated == 5 * PAGE_SIZE
    array.zero(1, 7 * PAGE_SIZE - 1)  # the last byte of that page that is not zero
    assert array.allocated == 4 * PAGE_SIZE


def test_zeros_over_nothing_take_no_page() -> None:
    array = SparseArray(8 * PAGE_SIZE)
    array.zero(3 * PAGE_SIZE + 5, 17)
    array.write(bytes(2 * PAGE_SIZE), PAGE_SIZE)
    assert array.allocated == 0


def test_reading_a_base_takes_no_page() -> None:
    array = SparseArray(SIZE, BASES[1])
    array.read(SIZE, 0)
    array.zero(2 * PAGE_SIZE, PAGE_SIZE)
    assert array.allocated == 0


def test_what_hides_the_base_stays_small() -> None:
    array = SparseArray(SIZE, BASES[1])
    for page in (0, 2, 4, 3, 1):
        array.zero(PAGE_SIZE, page * PAGE_SIZE)
    assert array._hidden.firsts == (0,)
    assert array._hidden.lasts == (5,)


def test_buffers_of_other_items_count_in_bytes() -> None:
    array = SparseArray(PAGE_SIZE)
    array.write(memoryview(b"abcdefgh").cast("I"), 1)
    assert bytes(array.read(10, 0)) == b"\0abcdefgh\0"


def test_a_read_within_a_page_is_not_a_copy() -> None:
    array = SparseArray(PAGE_SIZE)
    array.write(b"before", 0)
    view = array.read(6, 0)
    array.write(b"behind", 0)
    assert bytes(view) == b"behind"
    array.zero(PAGE_SIZE, 0)
    assert bytes(view) == b"behind", "a dropped page stays whole for those who still read it"


@pytest.mark.parametrize("base", BASES[:2], ids=["empty", "base"])
def test_parallel_writes_and_zeros_lose_nothing(base: Under | None) -> None:
    """Threads that own interleaved stripes of the same pages never lose each other's bytes."""
    array = SparseArray(SIZE, base)
    threads, stripe, rounds = 4, 512, 60
    start = threading.Barrier(threads)
    failures: list[object] = []

    def work(mine: int) -> None:
        start.wait()
        spots = range(mine * stripe, 4 * PAGE_SIZE, threads * stripe)
        for turn in range(rounds):
            content = bytes((turn + mine) % 255 + 1 for _ in range(stripe))
            for offset in spots:
                if turn % 2:
                    array.zero(stripe, offset)  # drops the page when the others are zero as well
                else:
                    array.write(content, offset)
            expected = bytes(stripe) if turn % 2 else content
            for offset in spots:
                if bytes(array.read(stripe, offset)) != expected:
                    failures.append((mine, turn, offset))
                    return

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as many turns as the interpreter gives
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
