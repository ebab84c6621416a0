"""Extents: which parts of a disk are allocated, holes, or zero.

A plugin answers with any iterable of (offset, length, type); `normalise` turns that into what the
protocol may carry, or says what is wrong with it (nbdkit-plugin(3), "Extents list").
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final, NamedTuple

    class Extent(NamedTuple):
        """One extent: `offset` and `length` in bytes, `type` a sum of HOLE and ZERO (0: data)."""

        offset: int
        length: int
        type: int
else:
    Extent = namedtuple("Extent", ("offset", "length", "type"))
    Extent.__doc__ = "One extent: offset and length in bytes, type a sum of HOLE and ZERO."

HOLE: Final = 1
"""Not allocated."""
ZERO: Final = 2
"""Reads back as zeros."""


def normalise(
    extents: Iterable[tuple[int, int, int]],
    count: int,
    offset: int,
    limit: int = 0,
    known: int = HOLE | ZERO,
) -> list[Extent]:
    """Clip a plugin's extents to a range, join neighbours of one type, and check them.

    Arguments: the plugin's answer; the range's length and offset in bytes; `limit` bounds how many
    extents are taken (0: all); `known` has the bits that a type may have. The answer starts at
    `offset`, has no gap, and covers at least one byte; it may end early (the protocol lets a server
    answer for less than was asked).

    Raises ValueError, naming the rule, where the plugin's answer has a gap, runs backwards, has a
    negative length, an unknown type, or does not cover `offset`.
    """
    end = offset + count
    result: list[Extent] = []
    position: int | None = None  # where the next extent has to start
    for start, length, kind in extents:
        if length < 0 or start < 0:
            raise ValueError(f"extent at {start} with length {length}: negative")
        if kind & ~known:
            raise ValueError(f"extent at {start}: unknown type {kind}")
        if length == 0:
            continue
        if position is None:
            if start > offset:
                raise ValueError(f"first extent starts at {start}, after the offset {offset}")
        elif start != position:
            raise ValueError(f"extent starts at {start}, the one before ends at {position}")
        position = start + length
        if position <= offset:
            continue
        if start >= end:
            break
        first = max(start, offset)
        last = min(position, end)
        if result and result[-1].type == kind:
            previous = result[-1]
            result[-1] = Extent(previous.offset, last - previous.offset, kind)
        else:
            if limit and len(result) >= limit:
                break
            result.append(Extent(first, last - first, kind))
        if last == end:
            break
    if not result:
        raise ValueError(f"no extent covers the offset {offset}")
    return result
