"""When connections are better served together: the scores, played with batches in any order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.server.company import (
    FEW,
    HEAVY,
    LARGE_WRITE,
    MANY,
    SEVERAL,
    SMALL_REQUEST,
    Company,
)


def companies(count: int, connections: int = 5, in_memory: bool = False) -> list[Company]:
    """Of so many busy connections, in a server that has `connections`."""
    place: Any = SimpleNamespace(last=None, connections=connections)
    return [Company(place, SimpleNamespace(), in_memory) for _ in range(count)]  # type: ignore[arg-type]


def play(turns: list[int]) -> list[bool]:
    """What each batch finds, of the connections whose turns these are."""
    all_of_them = companies(max(turns) + 1)
    found = []
    for turn in turns:
        all_of_them[turn].look_around(512, False)
        found.append(all_of_them[turn].found(512))
    return found


@given(st.integers(1, 200))
def test_one_alone(batches: int) -> None:
    assert not any(play([0] * batches))


@given(st.lists(st.integers(0, 4), min_size=100, max_size=200))
def test_where_each_batch_follows_anothers(steps: list[int]) -> None:
    turns = [0]
    for step in steps:
        turns.append((turns[-1] + 1 + step) % 6)  # never the same again
    found = play(turns)
    for who in range(6):
        own = [told for turn, told in zip(turns, found, strict=True) if turn == who]
        assert own == [2 * number >= SEVERAL for number in range(1, len(own) + 1)]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=200))
def test_it_says_who_is_alone(turns: list[int]) -> None:
    """Who has come as often as it takes with nobody else between, after however much company."""
    all_of_them = companies(3)
    for turn in turns:
        all_of_them[turn].look_around(512, False)
    lonely = all_of_them[0]
    for _ in range(SEVERAL + 2):
        lonely.look_around(512, False)
        assert not lonely.found(512) or not lonely.alone
    assert lonely.alone


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(3, 30)), min_size=40, max_size=60))
def test_those_who_come_in_bursts(bursts: list[tuple[int, int]]) -> None:
    turns: list[int] = []
    for who, length in bursts:
        turns += [who] * length
    assert not any(play(turns))


def test_who_forgets_begins_again() -> None:
    one, other = companies(2)
    for _ in range(SEVERAL):
        one.look_around(512, False)
        other.look_around(512, False)
    assert one.found(512)
    assert other.found(512)
    one.forget()
    assert one.alone
    assert not one.found(512)
    assert other.found(512)


@pytest.mark.parametrize(
    ("in_memory", "connections", "count", "suits"),
    [
        (False, 1, SMALL_REQUEST, True),
        (False, 100, SMALL_REQUEST + 1, False),
        (True, MANY, SMALL_REQUEST, True),
        (True, MANY, SMALL_REQUEST + 1, False),
        (True, MANY - 1, 512, False),
    ],
)
def test_what_suits(in_memory: bool, connections: int, count: int, suits: bool) -> None:
    (one,) = companies(1, connections, in_memory)
    assert one.suits(count) == suits


@pytest.mark.parametrize(
    ("count", "stores", "connections", "suits"),
    [
        (LARGE_WRITE, True, FEW, True),
        (SMALL_REQUEST, True, FEW, True),
        (LARGE_WRITE, True, FEW - 1, False),
        (LARGE_WRITE - 1, True, MANY - 1, False),
        (LARGE_WRITE, False, MANY - 1, False),  # a read: nothing is copied
    ],
)
def test_large_writes_suit_fewer(count: int, stores: bool, connections: int, suits: bool) -> None:
    (one,) = companies(1, connections, in_memory=True)
    one.weigh(count, stores)
    assert one.suits(count) == suits


def test_some_reads_among_the_writes_change_nothing_but_many_do() -> None:
    (one,) = companies(1, FEW, in_memory=True)
    for _ in range(100):
        one.weigh(SMALL_REQUEST, True)
        assert one.suits(512)
        one.weigh(SMALL_REQUEST, False)
        assert one.suits(512)
    for number in range(HEAVY):
        assert one.suits(512) == (number < HEAVY - 1)
        one.weigh(SMALL_REQUEST, False)
    assert not one.suits(512)
