"""The map of block states: against a plain list, and with changes while it is read."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbdkit.filters._blockmap import ALLOCATED, NOT_ALLOCATED, TRIMMED, BlockMap, Region

STATES = (NOT_ALLOCATED, ALLOCATED, TRIMMED)
BLOCKS = 150


@given(
    st.integers(2, 7),
    st.lists(
        st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 100), st.sampled_from(STATES)),
        max_size=30,
    ),
    st.integers(0, BLOCKS - 1),
    st.integers(0, BLOCKS),
)
def test_like_a_list(
    shift: int, changes: list[tuple[int, int, int]], first: int, count: int
) -> None:
    blocks = BlockMap(shift)
    model = [NOT_ALLOCATED] * BLOCKS
    size = 1 << shift
    for start, length, state in changes:
        end = min(start + length, BLOCKS, (start // size + 1) * size)  # within a region
        blocks.mark(start, end, state)
        model[start:end] = [state] * (end - start)
    assert [blocks.state(block) for block in range(BLOCKS)] == model
    assert set(blocks.regions) <= {start // size for start, _, _ in changes}

    end = min(first + count, BLOCKS)
    position = first
    previous = None
    for state, start, stop in blocks.runs(first, end):
        assert start == position
        assert start < stop
        assert model[start:stop] == [state] * (stop - start)
        assert start // size == (stop - 1) // size
        if previous == state:
            assert start % size == 0  # a run is as long as it can be
        previous, position = state, stop
    assert position == max(first, end)


def test_a_huge_disk_costs_what_is_touched() -> None:
    blocks = BlockMap(12)
    far = 1 << 51
    assert list(blocks.runs(far, far + 10)) == [(NOT_ALLOCATED, far, far + 10)]
    assert not blocks.regions
    blocks.mark(far + 3, far + 5, TRIMMED)
    assert [run[0] for run in blocks.runs(far, far + 10)] == [0, TRIMMED, 0]
    assert len(blocks.regions) == 1
    assert len(blocks.regions[far >> 12].states) == 1024  # two bits a block


def test_a_run_is_what_its_blocks_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change just when a run has been measured does not give the whole run the new state."""
    blocks = BlockMap(12)
    blocks.mark(20, 21, TRIMMED)
    real = Region.run_end

    def run_end(region: Region, index: int, end: int, state: int) -> int:
        found = real(region, index, end, state)
        blocks.mark(index - 1, index, ALLOCATED)  # the run's first block
        return found

    monkeypatch.setattr(Region, "run_end", run_end)
    assert list(blocks.runs(10, 30)) == [
        (NOT_ALLOCATED, 10, 20),
        (TRIMMED, 20, 21),
        (NOT_ALLOCATED, 21, 30),
    ]
    assert [blocks.state(block) for block in (10, 20, 21)] == [ALLOCATED] * 3


def test_runs_while_blocks_change() -> None:
    """Blocks become allocated one by one while runs are read: no block is called so too early."""
    blocks = BlockMap(12)
    count = 4000
    allocated = 0  # blocks below this are allocated
    done = threading.Event()

    def change() -> None:
        nonlocal allocated
        for block in range(count):
            blocks.mark(block, block + 1, ALLOCATED)
            allocated = block + 1
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    while not done.is_set():
        before = allocated
        runs = list(blocks.runs(0, count))
        after = allocated + 1
        for state, start, end in runs:
            if state == ALLOCATED:
                assert end <= after
            else:
                assert start >= before
    thread.join()
    assert list(blocks.runs(0, count)) == [(ALLOCATED, 0, count)]
