"""BlockMap: two bits for every block of a disk, kept only for the parts that were touched.

Blocks are gathered in regions. A region that nobody touched is not there, and all its blocks are
NOT_ALLOCATED; so the map of a disk of 8 EiB is empty at first. One that is there has a bytearray,
four blocks a byte, which is scanned for runs of one state by whole bytes.

Readers take no lock: each byte is read as it was before or after a change. Changes exclude each
other. A region also remembers its `place`, where its data begins in the overlay's file.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

NOT_ALLOCATED: Final = 0
"""The block is as it is in the layer below."""
ALLOCATED: Final = 1
"""The whole block is in the overlay's file."""
TRIMMED: Final = 2
"""The block reads as zeros, and is nowhere."""

_FOUR: Final = (b"\x00", b"\x55", b"\xaa")
"""Four blocks of one state, by state."""


class Region:
    """The states of some consecutive blocks (a multiple of 4), and the place of their data."""

    __slots__ = ("place", "states")

    def __init__(self, blocks: int) -> None:
        self.states = bytearray(blocks >> 2)
        self.place: int | None = None

    def state(self, index: int) -> int:
        """The state of one block."""
        return self.states[index >> 2] >> ((index & 3) << 1) & 3

    def run_end(self, index: int, end: int, state: int) -> int:
        """The first block from `index` on, and at most `end`, that is not in `state`."""
        while index < end and index & 3:
            if self.state(index) != state:
                return index
            index += 1
        if end - index >= 4:
            whole = bytes(self.states[index >> 2 : end >> 2])
            index += (len(whole) - len(whole.lstrip(_FOUR[state]))) << 2
        while index < end and self.state(index) == state:
            index += 1
        return index

    def fill(self, first: int, end: int, state: int) -> None:
        """Set the state of the blocks from `first` to before `end`."""
        while first < end and first & 3:
            self._set(first, state)
            first += 1
        whole = (end - first) >> 2
        if whole > 0:
            at = first >> 2
            self.states[at : at + whole] = _FOUR[state] * whole
            first += whole << 2
        while first < end:
            self._set(first, state)
            first += 1

    def _set(self, index: int, state: int) -> None:
        shift = (index & 3) << 1
        self.states[index >> 2] = self.states[index >> 2] & ~(3 << shift) | state << shift


class BlockMap:
    """States by block number; a region has ``1 << shift`` blocks, at least 4."""

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.regions: dict[int, Region] = {}
        self._mask = (1 << shift) - 1
        self._lock = threading.Lock()

    def state(self, block: int) -> int:
        """The state of one block."""
        region = self.regions.get(block >> self.shift)
        return NOT_ALLOCATED if region is None else region.state(block & self._mask)

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(state, first, end) of the runs of one state, in order; a run ends with its region."""
        while first < end:
            number = first >> self.shift
            base = number << self.shift
            stop = min(end, base + self._mask + 1)
            region = self.regions.get(number)
            if region is None:
                yield NOT_ALLOCATED, first, stop
                first = stop
                continue
            while first < stop:
                # Asked once, so that each block of the run had this very state when it was looked
                # at, whatever changes meanwhile.
                state = region.state(first - base)
                last = base + region.run_end(first - base + 1, stop - base, state)
                yield state, first, last
                first = last

    def mark(self, first: int, end: int, state: int) -> None:
        """Set the state of the blocks from `first` to before `end`, all of one region."""
        with self._lock:
            self.region(first).fill(first & self._mask, ((end - 1) & self._mask) + 1, state)

    def region(self, block: int) -> Region:
        """The region of a block; a new one where it was not there."""
        number = block >> self.shift
        region = self.regions.get(number)
        if region is None:
            region = self.regions.setdefault(number, Region(self._mask + 1))
        return region
