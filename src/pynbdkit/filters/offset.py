"""offset: serve a part of the disk (nbdkit-offset-filter(1)).

Where the part begins at 0, only the size differs and every operation stays bound to the layer
below. Else each operation is shifted on its way down, and extents on their way up.
"""

from __future__ import annotations

from .. import parameters
from ..errors import OpenError
from ..extents import Extent
from ..filter import Filter, FilterDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..complete import Layer
    from ..device import Buffer, Device
    from ..session import Session


class OffsetFilter(Filter):
    """Serve the byte range [offset, offset+range) of the disk."""

    longname = "offset filter"
    forkable = True
    offset = parameters.size("Where the part begins", default=0, metavar="OFFSET")
    range = parameters.size("How long the part is (default: to the end)", metavar="LENGTH")

    def open(self, next: Callable[[Session], Layer], session: Session) -> Device:
        """Raises OpenError where the part does not lie within the disk."""
        below = next(session)
        size = below.get_size()
        start, length = self.offset, self.range
        if start > size:
            raise OpenError(f"offset ({start}) is larger than the size ({size}) of the disk")
        if length is None:
            length = size - start
        elif start + length > size:
            raise OpenError(
                f"offset+range ({start}+{length}) is larger than the size ({size}) of the disk"
            )
        return _Shifted(below, length, start) if start else _Shortened(below, length)


class _Shortened(FilterDevice):
    def __init__(self, next: Layer, size: int) -> None:
        super().__init__(next)
        self._size = size

    def get_size(self) -> int:
        return self._size

    def block_status(self, context: str, count: int, offset: int, flags: int) -> list[Extent]:
        return self.next.block_status(context, count, offset, flags)


class _Shifted(_Shortened):
    def __init__(self, next: Layer, size: int, start: int) -> None:
        super().__init__(next, size)
        self._start = start

    def pread(self, count: int, offset: int, flags: int) -> Buffer:
        return self.next.unchecked_pread(count, offset + self._start, flags)  # checked outside

    def pwrite(self, buf: Buffer, offset: int, flags: int) -> None:
        self.next.pwrite(buf, offset + self._start, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset + self._start, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset + self._start, flags)

    def cache(self, count: int, offset: int, flags: int) -> None:
        self.next.cache(count, offset + self._start, flags)

    def extents(self, count: int, offset: int, flags: int) -> list[Extent]:
        start = self._start
        found = self.next.extents(count, offset + start, flags)
        return [Extent(at - start, length, kind) for at, length, kind in found]

    def block_status(self, context: str, count: int, offset: int, flags: int) -> list[Extent]:
        start = self._start
        found = self.next.block_status(context, count, offset + start, flags)
        return [Extent(at - start, length, status) for at, length, status in found]
