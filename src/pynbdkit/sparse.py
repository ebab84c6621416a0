"""SparseArray: a disk in memory that keeps what was written, and nothing else.

A dictionary maps a page's number to the page: 32 KiB that somebody wrote to. A page that is not
there reads as zeros, or, where the array was given a `base`, as the base. Zeroing whole pages drops
them, and hides the base there; so does writing a page of zeros.

Parallel calls: `write` and `zero` exclude each other, so that one which touches the same bytes as
another comes wholly before or after it. `read` and `extents` wait for nobody: a read beside a write
to the same bytes sees, for each page, the bytes before it or after it or some of both (which is
all that NBD promises), and never anything else; a write that has returned is seen.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final, Protocol

    from .device import Buffer

    class Base(Protocol):
        """What stands under the pages; it never changes."""

        def fill(self, out: memoryview, offset: int) -> None:
            """Copy bytes from `offset` on into `out`, which is all zeros, until it is full."""

        def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
            """(start, end) of what may hold data in the range, in order; the rest is zeros."""


PAGE_SIZE: Final = 32768
"""Bytes in a page."""
DATA: Final = 0
HOLE_ZERO: Final = 3
"""The type of a hole in `extents`: HOLE | ZERO."""

_SHIFT: Final = 15
_MASK: Final = PAGE_SIZE - 1
_ZERO_PAGE: Final = bytearray(PAGE_SIZE)
_ZERO_VIEW: Final = memoryview(_ZERO_PAGE).toreadonly()


class SparseArray:
    """`size` bytes, at first those of `base`, or zeros; `base` holds at least `size` bytes.

    Ranges are in bytes and must be within the size: a wrong one raises ValueError.
    """

    def __init__(self, size: int, base: Base | None = None) -> None:
        if not 0 <= size < 1 << 63:
            raise ValueError(f"size {size} is not in the range 0 to 2**63 - 1")
        self.size = size
        self._base = base
        self._pages: dict[int, memoryview] = {}
        self._hidden = _Ranges()  # pages of the base that were zeroed
        self._lock = threading.Lock()

    @property
    def allocated(self) -> int:
        """How many bytes the pages take."""
        return len(self._pages) << _SHIFT

    def read(self, count: int, offset: int) -> Buffer:
        """`count` bytes from `offset`: a view of the page where one page has them all.

        The view shows later writes to that page.
        """
        start = offset & _MASK
        if start + count <= PAGE_SIZE and self._base is None and 0 <= offset <= self.size - count:
            page = self._pages.get(offset >> _SHIFT, _ZERO_VIEW)
            return page[start : start + count]
        return self._gather(count, offset)

    def write(self, buf: Buffer, offset: int) -> None:
        """Write the whole of `buf` (any contiguous buffer of bytes)."""
        view = memoryview(buf)
        if view.itemsize != 1:
            view = view.cast("B")
        count = len(view)
        self._check(count, offset)
        pages = self._pages
        done = 0
        with self._lock:
            while done < count:
                number = (offset + done) >> _SHIFT
                start = (offset + done) & _MASK
                step = min(PAGE_SIZE - start, count - done)
                part = view[done : done + step]
                done += step
                page = pages.get(number)
                if page is not None:
                    if step == PAGE_SIZE and _is_zero(part):
                        self._hide(number, number + 1)
                        del pages[number]
                    else:
                        page[start : start + step] = part
                elif step < PAGE_SIZE:
                    page = self._new_page(number)
                    page[start : start + step] = part
                    pages[number] = page
                elif not _is_zero(part):
                    pages[number] = memoryview(bytearray(part))
                else:
                    self._hide(number, number + 1)

    def zero(self, count: int, offset: int) -> None:
        """Make the range read as zeros; whole pages, and pages that are zeros now, are dropped."""
        self._check(count, offset)
        end = offset + count
        first, last = (offset + _MASK) >> _SHIFT, end >> _SHIFT  # the whole pages
        with self._lock:
            if first > last:
                self._zero_part(last, offset & _MASK, end & _MASK)
                return
            if offset & _MASK:
                self._zero_part(first - 1, offset & _MASK, PAGE_SIZE)
            if first < last:
                self._hide(first, last)
                for number in self._numbers(first, last):
                    del self._pages[number]
            if last << _SHIFT < end:
                self._zero_part(last, 0, end & _MASK)

    def extents(self, count: int, offset: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, type) in order, without gaps: type 0 (data) or 3 (hole and zero).

        The steps are pages, and neighbours of one type are one extent. Made as they are asked for:
        take as many as you need.
        """
        self._check(count, offset)
        end = offset + count
        data_start = data_end = offset  # the run of data that may still grow
        for number, stop in self._data(offset >> _SHIFT, (end + _MASK) >> _SHIFT):
            begin, finish = number << _SHIFT, min(stop << _SHIFT, end)
            if begin <= data_end:
                data_end = max(finish, data_end)
                continue
            if data_start < data_end:
                yield data_start, data_end - data_start, DATA
            yield data_end, begin - data_end, HOLE_ZERO
            data_start, data_end = begin, finish
        if data_start < data_end:
            yield data_start, data_end - data_start, DATA
        if data_end < end:
            yield data_end, end - data_end, HOLE_ZERO

    def _check(self, count: int, offset: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ValueError(
                f"{count} bytes at {offset} are not within the array of {self.size} bytes"
            )

    def _gather(self, count: int, offset: int) -> bytearray:
        """A copy of a range."""
        self._check(count, offset)
        result = bytearray(count)
        out = memoryview(result)
        pages = self._pages
        end = offset + count
        position = waiting = offset  # from `waiting` to `position` nothing is in pages
        while position < end:
            number = position >> _SHIFT
            start = position & _MASK
            step = min(PAGE_SIZE - start, end - position)
            page = pages.get(number)
            if page is not None:
                self._fill(out[waiting - offset : position - offset], waiting)
                out[position - offset : position - offset + step] = page[start : start + step]
                waiting = position + step
            position += step
        self._fill(out[waiting - offset :], waiting)
        return result

    def _fill(self, out: memoryview, offset: int) -> None:
        """What of the base can be seen."""
        if self._base is not None and out:
            position, end = offset, offset + len(out)
            for first, last in self._hidden.within(offset >> _SHIFT, (end + _MASK) >> _SHIFT):
                stop = min(max(first << _SHIFT, position), end)
                if position < stop:
                    self._base.fill(out[position - offset : stop - offset], position)
                position = max(last << _SHIFT, position)
            if position < end:
                self._base.fill(out[position - offset :], position)

    def _new_page(self, number: int) -> memoryview:
        page = memoryview(bytearray(PAGE_SIZE))
        begin = number << _SHIFT
        self._fill(page[: min(PAGE_SIZE, self.size - begin)], begin)
        return page

    def _hide(self, first: int, last: int) -> None:
        if self._base is not None:
            self._hidden = self._hidden.add(first, last)

    def _zero_part(self, number: int, start: int, end: int) -> None:
        page = self._pages.get(number)
        if page is None:
            if self._base is None or self._hidden.has(number):
                return
            page = self._new_page(number)
        page[start:end] = _ZERO_VIEW[start:end]
        if page.obj == _ZERO_PAGE:
            self._hide(number, number + 1)
            self._pages.pop(number, None)
        else:
            self._pages[number] = page

    def _numbers(self, first: int, last: int) -> list[int]:
        """The pages in a range that are there, in order."""
        if last - first < 4 * len(self._pages):
            return [number for number in range(first, last) if number in self._pages]
        return sorted(number for number in list(self._pages) if first <= number < last)

    def _data(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(first, last) page numbers of what may hold data, in order; pieces may touch."""
        position = first
        for number in self._numbers(first, last):
            if position < number:
                yield from self._base_data(position, number)
            yield number, number + 1
            position = number + 1
        if position < last:
            yield from self._base_data(position, last)

    def _base_data(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        if self._base is None:
            return
        for start, stop in self._hidden.between(first, last):
            end = min(stop << _SHIFT, self.size)
            for begin, finish in self._base.data(start << _SHIFT, end):
                yield begin >> _SHIFT, (finish + _MASK) >> _SHIFT


class _Ranges:
    """An immutable set of page numbers, in ranges: readers use it while a writer makes the next."""

    __slots__ = ("firsts", "lasts")

    def __init__(self, firsts: tuple[int, ...] = (), lasts: tuple[int, ...] = ()) -> None:
        self.firsts = firsts
        self.lasts = lasts

    def add(self, first: int, last: int) -> _Ranges:
        """With the numbers from `first` to before `last`."""
        low = bisect_left(self.lasts, first)
        high = bisect_right(self.firsts, last)
        if low < high:
            first = min(first, self.firsts[low])
            last = max(last, self.lasts[high - 1])
        return _Ranges(
            (*self.firsts[:low], first, *self.firsts[high:]),
            (*self.lasts[:low], last, *self.lasts[high:]),
        )

    def has(self, number: int) -> bool:
        """Whether it is in the set."""
        index = bisect_right(self.firsts, number) - 1
        return index >= 0 and number < self.lasts[index]

    def within(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges that have something between `first` and `last`, in order."""
        index = bisect_right(self.lasts, first)
        while index < len(self.firsts) and self.firsts[index] < last:
            yield self.firsts[index], self.lasts[index]
            index += 1

    def between(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """What is not in the set between `first` and `last`, in order."""
        for start, stop in self.within(first, last):
            if first < start:
                yield first, start
            first = stop
        if first < last:
            yield first, last


def _is_zero(part: memoryview) -> bool:
    """Whether a whole page is zeros; a page that begins with another byte costs nothing."""
    return not part[0] and _ZERO_PAGE.startswith(part)  # memcmp, where == on views takes 50 us
