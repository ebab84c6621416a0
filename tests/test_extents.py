"""normalise: a plugin's extents, against a model that has a type for every byte."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.extents import HOLE, ZERO, Extent, normalise

KINDS = st.sampled_from((0, HOLE, ZERO, HOLE | ZERO))


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], int, int]:
    """(a right answer, count, offset): contiguous, from `offset` or before, of any length."""
    offset = draw(st.integers(0, 50))
    count = draw(st.integers(1, 60))
    start = draw(st.integers(0, offset))
    extents = []
    for length, kind in draw(st.lists(st.tuples(st.integers(0, 40), KINDS), max_size=12)):
        extents.append((start, length, kind))
        start += length
    if start <= offset:  # at least one byte has to be covered
        extents.append((start, offset - start + draw(st.integers(1, 20)), draw(KINDS)))
    return extents, count, offset


def per_byte(extents: list[tuple[int, int, int]]) -> dict[int, int]:
    return {byte: kind for start, length, kind in extents for byte in range(start, start + length)}


@given(answers(), st.integers(0, 4))
def test_against_a_type_for_every_byte(
    answer: tuple[list[tuple[int, int, int]], int, int], limit: int
) -> None:
    """The same bytes have the same types; in order, no gaps, no two neighbours alike."""
    extents, count, offset = answer
    result = normalise(iter(extents), count, offset, limit)
    assert all(isinstance(extent, Extent) for extent in result)
    assert result[0].offset == offset
    for before, after in itertools.pairwise(result):
        assert before.offset + before.length == after.offset
        assert before.type != after.type
    model = {
        byte: kind for byte, kind in per_byte(extents).items() if offset <= byte < offset + count
    }
    covered = per_byte([(start, length, kind) for start, length, kind in result])
    assert covered.items() <= model.items()
    runs = len([key for key, _ in itertools.groupby(model.values())])
    assert len(result) == (min(limit, runs) if limit else runs)
    if len(result) == runs:
        assert covered == model


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ([], "no extent covers the offset 100"),
        ([(0, 100, 0)], "no extent covers the offset 100"),
        ([(0, 0, 0), (100, 0, 0)], "no extent covers the offset 100"),
        ([(101, 10, 0)], "first extent starts at 101, after the offset 100"),
        ([(100, 10, 0), (111, 1, 0)], "extent starts at 111, the one before ends at 110"),
        ([(100, 10, 0), (109, 1, 0)], "extent starts at 109, the one before ends at 110"),
        ([(100, 10, 0), (90, 10, 0)], "extent starts at 90, the one before ends at 110"),
        ([(100, -1, 0)], "extent at 100 with length -1: negative"),
        ([(-1, 200, 0)], "extent at -1 with length 200: negative"),
        ([(100, 10, 4)], "extent at 100: unknown type 4"),
        ([(100, 10, -1)], "extent at 100: unknown type -1"),
    ],
)
def test_wrong_answers(extents: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        normalise(extents, 50, 100)


def test_reads_no_more_than_it_needs() -> None:
    """An answer may be a generator over a whole disk, or without end."""
    taken = []

    def endless() -> Iterator[tuple[int, int, int]]:
        for number in itertools.count():
            taken.append(number)
            yield (number * 10, 10, number % 2)

    assert normalise(endless(), 25, 0) == [(0, 10, 0), (10, 10, 1), (20, 5, 0)]
    assert len(taken) == 3
    taken.clear()
    assert normalise(endless(), 1 << 40, 0, limit=1) == [(0, 10, 0)]
    assert len(taken) == 2  # the next one might have been of the same type


def test_what_follows_the_range_is_not_looked_at() -> None:
    """Beyond the end, even nonsense does no harm: it is never sent."""
    assert normalise([(0, 10, 0), (5, 1, 99)], 10, 0) == [(0, 10, 0)]


def test_numbers_are_the_protocols() -> None:
    """NBD protocol, "base:allocation": NBD_STATE_HOLE, NBD_STATE_ZERO."""
    assert (HOLE, ZERO) == (1, 2)
